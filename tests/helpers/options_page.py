"""The page of all options in Chinese, docs/options.zh.md: `python -m tests.helpers.options_page` writes it from the command lines."""

from pathlib import Path

import typer

from minimind_cli import data, train

PAGE = Path(__file__).parent.parent.parent / "docs" / "options.zh.md"
PROGRAMS = {"mm-data": data.app, "mm-train": train.app}
TRAINING = ("pretrain", "sft", "dpo")
WEIGHTS = ("generate", "serve", "eval", "export")
HEAD = """# 全部命令行选项

[常见问题](faq.zh.md) · [从文本到数据集](datasets.zh.md) · [MiniMind 的参数对照](from-minimind.zh.md)

这一页由 `python -m tests.helpers.options_page` 从程序生成，请不要手改。★ 是最常用的十几个。
默认值和取值范围请看 `--help`（例如 `mm-train pretrain --help`），帮助和报错都是英文，便于搜索。
`--hidden-size` 也可以写成 `--hidden_size`。
"""
MARKED = frozenset(
    {
        "--shards",
        "--run",
        "--resume",
        "--from-weight",
        "--epochs",
        "--global-batch",
        "--micro-batch",
        "--seq-len",
        "--layout",
        "--learning-rate",
        "--nproc",
        "--dtype",
        "--save-every",
        "--lora-rank",
        "tokenize--out",
        "tokenize--tokenizer",
        "tokenize--kind",
    }
)
CHINESE = {
    "--out": "输出位置",
    "tokenize--out": "数据集写到哪个文件夹",
    "export--out": "导出到哪里：新文件夹；minimind 和 gguf 也可以直接写 .pth、.gguf 文件名",
    "plot--out": "写到哪个文件：.html 是网页，.png、.svg、.pdf 是图片",
    "--tokenizer": "分词器：名字、tokenizer.json 或其文件夹",
    "tokenize--tokenizer": "分词器：minimind3、minimind2、default，tokenizer.json 或其文件夹，或下载过的模型 id",
    "--kind": "数据类型：pretrain 文本、sft 对话、dpo 偏好",
    "--format": "输入格式，默认自动识别",
    "--field": "文本所在的字段，可以嵌套（a.b）",
    "--template": "把几个字段拼成文本，如 `'{question} {answer}'`",
    "--separator": "纯文本文件里文档之间的分隔符",
    "--max-word-chars": "连续不断开的字符最多多少个，超过算格式错误",
    "--chat-template": "另外指定对话模板文件",
    "--allow-special-in-content": "消息里的特殊 token 也当 token（与 MiniMind 相同）",
    "--empty-think-ratio": "保留空 `<think>` 的对话比例",
    "--chat-date": "模板要写当天日期时，固定用这个日期",
    "--val-fraction": "分给验证集的文档比例",
    "--dedup": "exact：完全相同的文本只保留一篇",
    "--workers": "用多少个 CPU 核，0 为全部",
    "--split-bytes": "每个分片对应多少字节的输入",
    "--engine": "在本机还是在 Ray 集群上分词",
    "--task": "I/N：只做第 I 份，最后用 commit 合并",
    "--on-bad-record": "遇到格式错误的数据：停下，或放到一边继续",
    "--max-bad-share": "错误数据超过这个比例就停下",
    "--on-removed-input": "原有输入没写上时：停下，或去掉它的文档",
    "--backend": "编码后端，默认选结果精确的里面最快的",
    "--bos-token": "指定 BOS；none 表示不加",
    "--eos-token": "指定 EOS",
    "--pad-token": "指定 PAD",
    "--vocab-size": "词表大小，含特殊 token",
    "--json": "只输出一个 JSON 对象",
    "--seq-len": "窗口长度（token 数）",
    "--layout": "窗口布局：concat 连续截取，pad 一窗一篇，pack 打包",
    "--long-documents": "pack 布局放不下的长文档：截断、分成几段或丢弃",
    "--labels": "显示未移位的 labels，而不是 targets",
    "--position": "位置：从训练开始算起的样本数",
    "--run": "训练文件夹",
    "generate--run": "训练文件夹、Hugging Face 文件夹或 .pth",
    "serve--run": "训练文件夹、Hugging Face 文件夹或 .pth",
    "eval--run": "训练文件夹、Hugging Face 文件夹或 .pth",
    "export--run": "训练文件夹、Hugging Face 文件夹或 .pth",
    "--order": "样本顺序：shuffled 打乱，sequential 按原顺序",
    "--shuffle-block": "按多大的块打乱，适合慢盘",
    "--seed": "随机种子",
    "--html": "写出可翻看窗口的网页",
    "--windows": "取多少个窗口",
    "--separator-id": "nanoGPT、llm.c 文件里文档之间的 id",
    "--column": "hf、parquet 里 ids 所在的列",
    "--shard-bytes": "每个分片多少字节",
    "--one-file": "所有分片写成一个文件",
    "--copy": "复制分片，而不是硬链接",
    "--from": "来源格式，默认自动识别",
    "convert--to": "目标格式",
    "export--to": "目标格式：hf、minimind、peft、gguf 等",
    "--shards": "数据集文件夹；混合数据写多次 NAME=DIR:WEIGHT",
    "eval--shards": "用来评测的数据集",
    "--resume": "断点续训；auto：有就续训，没有就开始",
    "--allow-change": "续训时允许改变的选项名",
    "--preset": "MiniMind 发布过的一种模型规模",
    "--config": "从 TOML 文件读选项，如训练文件夹里的 run.toml",
    "--from-weight": "初始权重：训练文件夹、Hugging Face 文件夹或 .pth；none 为随机初始化",
    "--from-step": "初始权重取哪一步的检查点，或 best",
    "--epochs": "训练几轮（epoch）",
    "--steps": "总步数，代替 epochs",
    "--global-batch": "全局 batch：每次更新用多少个窗口（= batch_size × 梯度累积步数 × 进程数）",
    "--micro-batch": "每张卡一次前向的窗口数，显存不够就调小",
    "--learning-rate": "峰值学习率，余弦衰减到十分之一",
    "--device": "设备：auto、cpu、cuda、cuda:1 等",
    "--nproc": "本机进程数，一个进程一张卡",
    "--dtype": "矩阵乘法的精度：auto、bf16、fp16、fp32",
    "export--dtype": "导出权重的精度；q8_0 只用于 gguf",
    "--lora-rank": "LoRA 的 rank，0 为全参数训练",
    "--lora-alpha": "LoRA 的 alpha，默认等于 rank",
    "--lora-targets": "LoRA 加在哪些矩阵上",
    "--document-mask": "文档间注意力隔离（无污染打包）",
    "--resume-from": "按顺序读时，从哪个分片的哪个 token 开始",
    "--skip-positions": "A:B：永久剔除这些位置的样本",
    "--hidden-size": "隐藏层宽度",
    "--num-hidden-layers": "层数",
    "--num-attention-heads": "注意力头数（query）",
    "--num-key-value-heads": "key/value 头数（GQA）",
    "--head-dim": "每个头的维度",
    "--intermediate-size": "MLP 的宽度",
    "--max-position-embeddings": "模型支持的最大长度",
    "--rms-norm-eps": "RMSNorm 的 epsilon",
    "--rope-theta": "RoPE 的 theta",
    "--tie-word-embeddings": "输出矩阵与嵌入共享",
    "--dropout": "dropout 概率",
    "--qk-norm": "q/k norm（minimind-3 有，minimind2 没有）",
    "--use-moe": "MLP 换成 MoE",
    "--num-experts": "每层的路由专家数",
    "--num-experts-per-tok": "每个 token 用几个专家（top-k）",
    "--n-shared-experts": "共享专家数",
    "--moe-intermediate-size": "每个专家的宽度",
    "--scoring-func": "router 打分方式：softmax 或 sigmoid",
    "--norm-topk-prob": "选中专家的权重归一化",
    "--router-aux-loss-coef": "负载均衡 loss 的系数，0 为关闭",
    "--seq-aux": "在每个窗口内均衡专家",
    "--inference-rope-scaling": "用 YaRN 扩展上下文",
    "--yarn-factor": "YaRN：扩展倍数",
    "--yarn-original-max-position-embeddings": "YaRN：扩展前的最大长度",
    "--yarn-beta-fast": "YaRN：beta_fast",
    "--yarn-beta-slow": "YaRN：beta_slow",
    "--yarn-attention-factor": "YaRN：注意力系数",
    "--optimizer": "优化器：adamw 或 muon",
    "--warmup-steps": "学习率预热步数",
    "--weight-decay": "权重衰减",
    "--beta1": "Adam 的 beta1",
    "--beta2": "Adam 的 beta2",
    "--eps": "Adam 的 epsilon",
    "--muon-momentum": "Muon 的动量",
    "--grad-clip": "梯度裁剪的范数上限，0 为不裁剪",
    "--parallel": "数据并行方式：ddp 或 fsdp",
    "--tf32": "GPU 上允许 TF32",
    "--compile": "用 torch.compile 编译各层",
    "--activation-checkpointing": "激活重算：省显存，多三分之一计算",
    "--threads": "torch 的 CPU 线程数",
    "--save-every": "每多少步存一个检查点",
    "--keep": "保留最新的几个检查点，0 为全部",
    "--keep-every": "每多少步永久保留一个检查点",
    "--save-best": "验证 loss 最低时也保存",
    "--max-hours": "最多训练几小时，到时保存退出",
    "--on-nonfinite": "出现 NaN 或 Inf 时：停下，或跳过这一步",
    "--track": "实验跟踪：swanlab、wandb、tensorboard，可写多次",
    "--track-project": "SwanLab 和 W&B 里的项目名",
    "--sample-every": "每多少步让模型写一段文本",
    "--sample-prompt": "这段文本的 prompt，可写多次",
    "--sample-tokens": "这段文本最多多少 token",
    "--log-every": "每多少步记一行指标",
    "--val-shards": "验证集",
    "--val-every": "每多少步验证一次",
    "--val-batches": "每次验证用多少个全局 batch，0 为全部",
    "--reweight-at-resume": "续训时改变数据混合的配比",
    "--beta": "DPO 的 beta",
    "--loss-type": "DPO 的 loss：sigmoid、hinge 或 ipo",
    "--label-smoothing": "DPO 的标签平滑",
    "--length-normalised": "对数概率按回答长度取平均",
    "--reference": "参考模型的对数概率：缓存，或每步现算",
    "--prompt": "要续写的文本；加 --chat 则是一个问题",
    "--chat": "多轮对话",
    "--system": "system prompt",
    "--thinking": "先思考再作答；--no-thinking 跳过思考",
    "--tools": "模型可以调用的函数（JSON 文件）",
    "--lora": "合并 MiniMind 的 `lora_*.pth`",
    "--max-new-tokens": "最多生成多少 token",
    "--temperature": "采样温度，0 为贪心",
    "--top-p": "top-p 采样",
    "--top-k": "top-k 采样，0 为不限",
    "--checkpoint": "用哪一步的检查点，或 best",
    "--host": "监听地址",
    "--port": "监听端口",
    "--x": "曲线的横轴：step、tokens 或 position",
}
"""What an option means, by its name, or by the command and its name where it means something else there."""


def commands() -> dict[tuple[str, str], dict[str, tuple[str, ...]]]:
    """Return the options of each command by their first name, each with all its names."""
    return {
        (program, name): {
            parameter.opts[0]: (*parameter.opts, *parameter.secondary_opts)
            for parameter in command.params
            if parameter.param_type_name == "option"
        }
        for program, app in PROGRAMS.items()
        for name, command in typer.main.get_command(app).commands.items()
    }


def table(name: str, options: dict[str, tuple[str, ...]]) -> str:
    """Return the rows of a command's options; what is missing in Chinese is a KeyError."""
    rows = [
        f"| {'、'.join(f'`{one}`' for one in names)}{' ★' if name + flag in MARKED or (name in TRAINING and flag in MARKED) else ''} "
        f"| {CHINESE.get(name + flag) or CHINESE[flag]} |\n"
        for flag, names in options.items()
    ]
    return "\n| 选项 | 含义 |\n|---|---|\n" + "".join(rows)


def page() -> str:
    """Return the text of the page."""
    of_all = commands()
    shared = set.intersection(*(set(of_all["mm-train", name]) for name in TRAINING))
    of_weights = set.intersection(*(set(of_all["mm-train", name]) for name in WEIGHTS))
    shape = {
        flag: names
        for flag, names in of_all["mm-train", "pretrain"].items()
        if flag in of_weights - {"--run"}
    }
    text = HEAD
    for (program, name), options in of_all.items():
        if (program, name) == ("mm-train", "pretrain"):
            text += "\n## `mm-train pretrain`、`sft` 和 `dpo` 共有\n"
            text += table(name, {flag: names for flag, names in options.items() if flag in shared})
        rest = options
        if name in TRAINING:
            rest = {flag: names for flag, names in options.items() if flag not in shared}
        if name in WEIGHTS and program == "mm-train":
            rest = {flag: names for flag, names in options.items() if flag not in shape}
        if rest:
            text += f"\n## `{program} {name}`\n{table(name, rest)}"
        if program == "mm-train" and name in WEIGHTS:
            text += "\n另有说明 `.pth` 模型结构的选项，含义同上：" + "、".join(
                f"`{names[0]}`" for names in shape.values()
            )
            text += "。\n"
    return text


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
