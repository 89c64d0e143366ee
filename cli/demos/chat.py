"""make demo-chat: pre-training, SFT and DPO in a few minutes, and what each stage changed.

The demo runs the commands that a user would type, and prints each before it runs. The texts are the samples in data/, so nothing
is downloaded. They are tiny, so the model can only memorise them, and the questions asked after each stage are among them. The
effect of each stage shows all the same. SFT teaches short and long answers to some questions; the pairs prefer the short ones, so
after DPO the model gives those. The first question has only one answer, which stays.
"""

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from .commands import output_of, run, title

_WORK = Path("runs/demo-chat")
_STAGES = ("pretrain", "sft", "dpo")
_TEXTS = {
    "pretrain": Path("data/sample.jsonl"),
    "sft": Path("data/sample_sft.jsonl"),
    "dpo": Path("data/sample_dpo.jsonl"),
}
_QUESTIONS = ["天空为什么是蓝色的？", "水在多少度结冰？", "What is the largest ocean on Earth?"]
_MODEL = "--hidden-size 192 --num-hidden-layers 3 --num-attention-heads 6 --num-key-value-heads 3"
_OPTIONS = {
    "pretrain": f"{_MODEL} --seq-len 128 --global-batch 4 --micro-batch 4 --steps 600 --learning-rate 2e-3 --warmup-steps 50",
    "sft": "--seq-len 160 --layout pack --global-batch 4 --micro-batch 4 --steps 250 --learning-rate 2e-3 --warmup-steps 20",
    "dpo": "--seq-len 96 --global-batch 44 --micro-batch 22 --epochs 12 --learning-rate 1e-4",
}


def main() -> None:
    """Run the demo in the current folder, which is the project's root."""
    for text in _TEXTS.values():
        if not text.is_file():
            sys.exit(f"error: {text}: not here; run the demo from the project's root")
    start = time.monotonic()
    shutil.rmtree(_WORK, ignore_errors=True)
    _WORK.mkdir(parents=True)

    title("0. Text, conversations and pairs to shards, with one tokenizer")
    for stage in _STAGES:
        # The README's table was made with this one.
        tokenizer = ("--tokenizer", "default")
        run(
            "mm-data",
            "tokenize",
            str(_TEXTS[stage]),
            "--kind",
            stage,
            *tokenizer,
            "--out",
            str(_shards(stage)),
        )

    answers, losses = {}, {}
    for number, stage in enumerate(_STAGES, 1):
        title(f"{number}. {_TITLES[stage]}")
        initial = [] if stage == "pretrain" else ["--from-weight", str(_run(_STAGES[number - 2]))]
        train = ("mm-train", stage, "--shards", str(_shards(stage)), "--run", str(_run(stage)))
        run(*train, *initial, *_OPTIONS[stage].split())
        answers[stage] = [_answer(stage, question) for question in _QUESTIONS]
        losses[stage] = _loss_on_answers(stage)

    title("What each stage changed")
    for number, question in enumerate(_QUESTIONS):
        print(f"  {question}")
        for stage in _STAGES:
            print(f"    after {stage:<9} {_one_line(answers[stage][number])}")
    print("\n  loss on the answers of the conversations, in nats per token")
    for stage in _STAGES:
        print(f"    after {stage:<9} {losses[stage]:.4f}")
    first, last = _metrics("dpo")[0], _metrics("dpo")[-1]  # each is over all pairs: they are one batch
    print("\n  chosen and rejected answers of the pairs, before and after DPO")
    for name in ("reward_margin", "reward_accuracy", "chosen_log_prob", "rejected_log_prob"):
        print(f"    {name.replace('_', ' '):<18} {first[name]:9.3f} {last[name]:9.3f}")
    print(f"\n  It took {time.monotonic() - start:.0f} seconds. To chat with the last model:")
    print(f"  mm-train generate --run {_run('dpo')} --chat")


_TITLES = {
    "pretrain": "Pre-training: the model learns to continue text",
    "sft": "SFT: from conversations it learns to answer, and to stop",
    "dpo": "DPO: from pairs it learns which of two answers is preferred",
}


def _shards(stage: str) -> Path:
    return _WORK / f"{stage}-data"


def _run(stage: str) -> Path:
    return _WORK / stage


def _answer(stage: str, question: str) -> str:
    options = ("--chat", "--prompt", question, "--temperature", "0", "--max-new-tokens", "48")
    return output_of("mm-train", "generate", "--run", str(_run(stage)), *options)


def _loss_on_answers(stage: str) -> float:
    options = ("--shards", str(_shards("sft")), "--seq-len", "160", "--layout", "pad", "--json")
    return float(json.loads(output_of("mm-train", "eval", "--run", str(_run(stage)), *options))["loss"])


def _metrics(stage: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (_run(stage) / "metrics.jsonl").read_text().splitlines()]


def _one_line(text: str) -> str:
    return " ".join(text.split())[:96] or "(nothing)"


if __name__ == "__main__":
    main()
