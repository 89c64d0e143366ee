"""docs/from-minimind.md is true: what it says of MiniMind is computed, from its flags, its defaults and a loop of its kind."""

import itertools
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from minimind_cli import data, train
from minimind_cli.minimind import translation
from minimind_data import open_windows
from minimind_data.build.pipeline import tokenize
from minimind_data.build.plan import TokenizeOptions
from minimind_data.chat.rendering import ChatOptions
from minimind_data.dataset.shard_set import ShardSet
from minimind_data.options import flatten
from minimind_data.tokenizer.places import SHIPPED
from minimind_train.generation.options import GenerateOptions
from minimind_train.model.config import ModelConfig
from minimind_train.model.transformer import MiniMind, initialize
from minimind_train.run import entry
from minimind_train.run.options import PHASE_OPTIONS
from tests.helpers import minimind_loop
from tests.helpers.commands import mm_data
from tests.helpers.minimind_flags import DEFAULTS, GENERATION_DEFAULTS, THEIRS, TRAINING
from tests.helpers.runs import Said, metrics

ROOT = Path(__file__).parent.parent
PAGE, CHINESE = (
    (ROOT / "docs" / f"from-minimind{ending}").read_text(encoding="utf-8") for ending in (".md", ".zh.md")
)
TITLE = re.compile(r"^## `([^`]*)`[:：]\s*`mm-train (\w+)`\n(.*?)(?=^## |\Z)", re.DOTALL | re.MULTILINE)
SECTIONS = TITLE.findall(PAGE)
COMMANDS = re.findall(r"^(mm-.*)$", PAGE, re.MULTILINE)
STAGES = ("pretrain", "sft", "lora", "dpo")
TEXTS = [record["text"] for record in minimind_loop.records_of(ROOT / "data" / "sample.jsonl")]
CONVERSATIONS = [
    record["conversations"] for record in minimind_loop.records_of(ROOT / "data" / "sample_sft.jsonl")
]


@pytest.fixture(scope="module")
def tokenizer():
    return minimind_loop.tokenizer_in(SHIPPED["minimind3"])


def flags_of(command):
    application = typer.main.get_command(train.app)
    parameters = application.commands[command].params
    return {flag for parameter in parameters for flag in (*parameter.opts, *parameter.secondary_opts)}


def cells(line):
    return tuple(cell.strip() for cell in line.strip("|").split("|"))


def rows(text):
    return [cells(line) for line in text.splitlines() if line.startswith("| `")]


def squeezed(page):
    return re.sub(r"\s+", " ", page)


def test_every_script_has_its_table():
    assert [script for script, _, _ in SECTIONS] == list(THEIRS)


@pytest.mark.parametrize(("script", "command", "text"), SECTIONS, ids=[script for script, _, _ in SECTIONS])
def test_a_table_begins_at_their_flags_and_ends_at_ours(script, command, text):
    ours = flags_of(command)
    told = re.findall(r"(?<![\w-])--[a-z][a-z-]*", " ".join(f"{here} {note}" for _, here, note in rows(text)))
    assert told
    assert set(told) <= ours
    theirs = {flag for cell, _, _ in rows(text) for flag in re.findall(r"--(\w+)", cell)}
    assert set(THEIRS[script]) <= theirs
    if command != "export":
        assert theirs <= {*TRAINING, *THEIRS[script], "nproc_per_node"}


def options_of(line):
    """The options of a run that a command line begins."""
    _, name, *words = shlex.split(line)
    context = typer.main.get_command(train.app).commands[name].make_context(name, words)
    passed = {
        option: value
        for option, value in context.params.items()
        if context.get_parameter_source(option).name == "COMMANDLINE"
    }
    options = PHASE_OPTIONS[name].of(**passed)
    return {**flatten(options), "epochs": options.training.epochs or options.default_epochs}


def in_our_units(stage):
    """MiniMind's defaults as options of ours, on one process."""
    theirs = DEFAULTS[stage]
    return {
        "seq_len": theirs["max_seq_len"] - 1,
        "epochs": theirs["epochs"],
        "micro_batch": theirs["batch_size"],
        "global_batch": theirs["batch_size"] * theirs["accumulation_steps"],
        "learning_rate": theirs["learning_rate"],
        "log_every": theirs["log_interval"] // theirs["accumulation_steps"],
        "save_every": theirs["save_interval"] // theirs["accumulation_steps"],
    }


def test_the_commands_have_minimind_s_settings():
    lines = [line for line in COMMANDS if re.match("mm-train (pretrain|sft|dpo) ", line)]
    assert len(lines) == len(STAGES)
    for stage, line in zip(STAGES, lines, strict=True):
        ours = options_of(line)
        assert {name: ours[name] for name in in_our_units(stage)} == in_our_units(stage), stage
        assert ours["layout"] == "pad"
        assert (ours["grad_clip"], ours["weight_decay"], ours["warmup_steps"]) == (1.0, 0.01, 0)
        assert ours["lora_rank"] == (16 if stage == "lora" else 0)
        assert not ours["use_moe"]


def test_the_table_of_defaults():
    ours = {
        stage: options_of(f"mm-train {'sft' if stage == 'lora' else stage} --shards data") for stage in STAGES
    }
    units = {stage: in_our_units(stage) for stage in STAGES}

    def column(values):
        return [float(value) for value in values]

    for page in (PAGE, CHINESE):
        section = next(part for part in page.split("\n## ") if "| `--max_seq_len` | 340" in part)
        table = [
            tuple([float(one) for one in cell.split(",")] if cell[0].isdigit() else cell for cell in row)
            for row in rows(section)
        ]
        by_flag = {row[0]: row for row in table}
        assert len(by_flag) == len(DEFAULTS["sft"])
        for flag, option in zip(DEFAULTS["sft"], in_our_units("sft"), strict=True):
            assert by_flag[f"`--{flag}`"] == (
                f"`--{flag}`",
                column(DEFAULTS[stage][flag] for stage in STAGES),
                column(units[stage][option] for stage in STAGES),
                f"`--{option.replace('_', '-')}`",
                column(ours[stage][option] for stage in STAGES),
            )


def test_defaults_of_generation():
    ours = flatten(GenerateOptions())
    line = next(line for line in COMMANDS if line.startswith("mm-train generate"))
    for name, value in GENERATION_DEFAULTS.items():
        if ours[name] != value:
            assert f"--{name.replace('_', '-')} {value}" in line
            assert f"{ours[name]} by default; theirs is {value}" in PAGE
        else:
            assert f"Also {value} by default" in next(
                text for script, _, text in SECTIONS if script == "eval_llm.py"
            )


def windows_of(folder, records, seq_len, **options):
    """The windows of layout pad over some records, with minimind3's tokenizer: inputs and targets, int64 [N, L]."""
    file = folder / "records.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    out = folder / "dataset"
    if not out.exists():
        tokenize([file], TokenizeOptions(out=out, workers=1, tokenizer=SHIPPED["minimind3"], **options))
    windows = open_windows(ShardSet.open(out), layout="pad", seq_len=seq_len)
    batch = windows[: len(windows)]
    return torch.as_tensor(batch["input_ids"]), torch.as_tensor(batch["targets"])


@pytest.mark.parametrize("max_seq_len", sorted({stage["max_seq_len"] for stage in DEFAULTS.values()}))
def test_one_token_of_length(tokenizer, tmp_path, max_seq_len):
    texts = [" ".join(TEXTS[first : first + 8]) for first in range(0, 120, 2)]  # of all lengths around it
    theirs = minimind_loop.text_samples(texts, tokenizer, max_seq_len)
    records = [{"text": text} for text in texts]
    inputs, targets = windows_of(tmp_path, records, max_seq_len - 1)
    assert torch.equal(inputs, theirs.inputs)
    assert torch.equal(targets, theirs.targets)
    # With as many targets as MiniMind's has tokens, what is cut keeps a token more.
    inputs, targets = windows_of(tmp_path, records, max_seq_len)
    cut = theirs.ids[:, -1] != tokenizer.pad_token_id
    assert cut.sum() > 0
    learned = (targets != minimind_loop.NO_TARGET).sum(1) - (theirs.targets != minimind_loop.NO_TARGET).sum(1)
    longer = torch.tensor([len(tokenizer(text).input_ids) > max_seq_len - 2 for text in texts])
    assert torch.equal(learned == 1, longer)
    assert torch.equal(learned == 0, ~longer)
    for page in (PAGE, CHINESE):
        assert re.search(rf"{max_seq_len - 1}\D+{max_seq_len}", page)
    for command in ("pretrain", "sft", "dpo"):
        hint = translation(command, ["--max_seq_len", str(max_seq_len)], flags_of(command))
        assert f"--seq-len {max_seq_len - 1}" in hint


def small_model(**options):
    shape = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 6400}
    model = MiniMind(ModelConfig(**shape, **options))
    initialize(model, 42)
    return model


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_how_far_their_gradient_is_from_the_mean_over_targets(tokenizer):
    answers = [
        [{"role": "user", "content": "?"}, {"role": "assistant", "content": text.replace("<|im_end|>", "")}]
        for text in TEXTS[: len(CONVERSATIONS)]
    ]
    mixed = [one for pair in zip(CONVERSATIONS, answers, strict=True) for one in pair]
    model = small_model(num_hidden_layers=1)
    weights = list(model.parameters())
    measured = []
    for samples in (
        minimind_loop.text_samples(TEXTS, tokenizer, 340),
        minimind_loop.chat_samples(CONVERSATIONS, tokenizer, 128),
        minimind_loop.chat_samples(mixed, tokenizer, 340),
    ):
        for batch_size, accumulation in ((4, 4), (1, 16)):
            shares = []
            plan = minimind_loop.updates(
                len(samples), batch_size=batch_size, accumulation_steps=accumulation, epochs=1
            )
            for update in itertools.islice(plan, 4):
                theirs, ours = (
                    minimind_loop.gradient(
                        lambda ids: model.logits(model(ids)),
                        weights,
                        [samples.of(one) for one in batches],
                        parts,
                    )
                    for batches, parts in (
                        (update.micro_batches, accumulation),
                        ([list(itertools.chain(*update.micro_batches))], 1),
                    )
                )
                shares.append(((theirs - ours).norm() / ours.norm()).item())
            measured.append(100 * sum(shares) / len(shares))
    for page in (PAGE, CHINESE):
        table = re.search(r"^\|[^\n]*16[^\n]*16[^\n]*\n\|-.*?\n((?:\|.*\n)+)", page, re.MULTILINE)[1]
        written = [int(cell) for line in table.splitlines() for cell in cells(line)[1:]]
        assert written == [pytest.approx(one, rel=0.1) for one in measured]


def test_the_end_of_an_epoch(tmp_path):
    theirs = list(minimind_loop.updates(len(TEXTS), batch_size=32, accumulation_steps=8, epochs=2))
    short = [update for update in theirs if update.strength < 1]
    (strength,) = {update.strength for update in short}
    tokenize([ROOT / "data" / "sample.jsonl"], TokenizeOptions(out=tmp_path / "data", workers=1))
    options = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    entry.begin(
        PHASE_OPTIONS["pretrain"].of(
            shards=str(tmp_path / "data"),
            run=tmp_path / "run",
            layout="pad",
            seq_len=8,
            epochs=2,
            log_every=1,
            device="cpu",
            dtype="fp32",
            threads=1,
            **options,
        ),
        Said(),
    )
    lines = metrics(tmp_path / "run")
    assert lines[-1]["position"] == 2 * len(TEXTS)
    numbers = (len(TEXTS), len(theirs), len(short), strength, len(lines))
    said = re.search(
        r"(\d+) texts of `data/sample.jsonl`, two epochs are (\d+) updates there, of which (\d+) have ([\d.]+) .* so they "
        r"are (\d+) steps",
        squeezed(PAGE),
    )
    assert tuple(map(float, said.groups())) == numbers
    in_chinese = re.search(
        r"`data/sample.jsonl` 的 (\d+) .*? (\d+) 次更新，其中 (\d+) .*? ([\d.]+) .*?只有 (\d+) 步",
        squeezed(CHINESE),
    )
    assert tuple(map(float, in_chinese.groups())) == numbers


def test_learning_rates_are_the_same_where_an_epoch_has_no_rest(tmp_path):
    records = [{"text": text} for text in TEXTS[:64]]
    windows_of(tmp_path, records, 8)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    options = {
        "seq_len": 8,
        "epochs": 2,
        "global_batch": 16,
        "micro_batch": 4,
        "log_every": 1,
        "learning_rate": 1.0,
    }
    entry.begin(
        PHASE_OPTIONS["pretrain"].of(
            shards=str(tmp_path / "dataset"), run=tmp_path / "run", layout="pad", device="cpu", dtype="fp32", threads=1,
            **options, **shape,
        ),
        Said(),
    )  # fmt: skip
    theirs = minimind_loop.updates(64, batch_size=4, accumulation_steps=4, epochs=2)
    assert [line["lr"] for line in metrics(tmp_path / "run")] == pytest.approx([one.rate for one in theirs])


def test_how_experts_are_balanced(tokenizer):
    inputs = minimind_loop.text_samples(TEXTS[:16], tokenizer, 340).inputs
    balance, theirs = {}, []
    for per_window in (True, False):
        model = small_model(
            num_hidden_layers=2, use_moe=True, router_aux_loss_coef=1.0, seq_aux=per_window
        ).train()
        with torch.no_grad():
            for layer in model.model.layers:
                layer.mlp.gate.weight.mul_(50)  # as if it had learned whom to send what
                layer.mlp.register_forward_pre_hook(
                    lambda mlp, args: theirs.append(
                        minimind_loop.balance_of((args[0] @ mlp.gate.weight.T).softmax(-1))
                    )
                )
            balance[per_window] = model.hidden_and_balance(inputs)[1].item()
    assert balance[False] == pytest.approx(sum(theirs[2:]).item(), rel=1e-5)
    for page in (PAGE, CHINESE):
        one, other = re.search(r"(3\.\d\d)\D+(3\.\d\d)", page).groups()
        assert (float(one), float(other)) == pytest.approx((balance[True], balance[False]), abs=0.02)


def test_empty_thoughts_of_a_fifth_of_the_conversations(tokenizer, tmp_path):
    records = [{"conversations": one} for one in CONVERSATIONS]
    inputs, targets = windows_of(tmp_path, records, 255, kind="sft", chat=ChatOptions(empty_think_ratio=0.2))
    with_thought, without = (
        minimind_loop.chat_samples(CONVERSATIONS, tokenizer, 256, lambda _, keep=keep: keep)
        for keep in (True, False)
    )
    kept = [index for index in range(len(records)) if torch.equal(inputs[index], with_thought.inputs[index])]
    for index in range(len(records)):
        theirs = with_thought if index in kept else without
        assert torch.equal(inputs[index], theirs.inputs[index])
        assert torch.equal(targets[index], theirs.targets[index])
    assert 0.1 < len(kept) / len(records) < 0.3


def test_records_that_teach_nothing_cost_a_line_of_the_summary(tmp_path):
    good = {"conversations": CONVERSATIONS[0]}
    bad = [
        [{"role": "user", "content": ""}, {"role": "assistant", "content": "yes"}],
        [{"role": "user", "content": "well?"}, {"role": "assistant", "content": ""}],
        [{"role": "user", "content": "well?"}],
    ]
    file = tmp_path / "sft.jsonl"
    lines = [good, *({"conversations": one} for one in bad), good]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    command = ("tokenize", file, "--kind", "sft", "--out", tmp_path / "data")
    stopped = mm_data(*command)
    assert stopped.exit_code == 1
    assert f"{file}:2: " in stopped.stderr
    assert "--on-bad-record set-aside" in stopped.stderr
    result = mm_data(*command, "--on-bad-record", "set-aside")
    assert result.exit_code == 0, result.output
    (line,) = [line for line in result.output.splitlines() if "set aside" in line]
    assert "3 bad records" in line
    many = tmp_path / "many.jsonl"
    many.write_text(
        "".join(json.dumps({"conversations": one}) + "\n" for one in bad * 10) + json.dumps(good) + "\n"
    )
    command = ("tokenize", many, "--kind", "sft", "--out", tmp_path / "few", "--on-bad-record", "set-aside")
    assert "--max-bad-share 1" in mm_data(*command).stderr
    assert mm_data(*command, "--max-bad-share", "1").exit_code == 0


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_the_commands_run_in_their_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("dataset").mkdir()
    small = "--hidden-size 16 --num-hidden-layers 1 --num-attention-heads 2 --num-key-value-heads 1"
    short = "--seq-len 64 --global-batch 2 --threads 1 --device cpu --dtype fp32"
    for name, source in {
        "pretrain_t2t_mini": "sample",
        "sft_t2t_mini": "sample_sft",
        "lora_medical": "sample_sft",
        "dpo": "sample_dpo",
    }.items():
        shutil.copy(ROOT / "data" / f"{source}.jsonl", f"dataset/{name}.jsonl")
    for line in COMMANDS:
        program, name, *words = shlex.split(line)
        if name in {"pretrain", "sft", "dpo"}:
            epochs = words.index("--epochs") if "--epochs" in words else len(words)
            words[epochs : epochs + 2] = ["--steps", "2"]
            words += shlex.split(f"{small} {short}" if name == "pretrain" else short)
        app = data.app if program == "mm-data" else train.app
        result = CliRunner().invoke(app, [name, *words], input="")
        assert result.exit_code == 0, (line, result.output, result.stderr)
    assert Path("out", "dpo_16.pth").is_file()


def test_the_chinese_page_has_the_same_commands_and_flags():
    def code(page):
        return re.findall(r"^```bash\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)

    def spans(page):
        return sorted(set(re.findall(r"`((?:mm-|python |--)[^`]*)`", page)))

    def links(page):
        return sorted(set(re.findall(r"\]\(([^)#]+)\)", page)) - {"from-minimind.md", "from-minimind.zh.md"})

    assert code(CHINESE) == code(PAGE)
    assert spans(CHINESE) == spans(PAGE)
    assert links(CHINESE) == links(PAGE)
    assert sorted(re.findall(r"--[\w-]+", CHINESE)) == sorted(re.findall(r"--[\w-]+", PAGE))
    assert [row[0] for row in rows(CHINESE)] == [row[0] for row in rows(PAGE)]
