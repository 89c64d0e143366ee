"""make demo: from text to a model in a few minutes. Training is killed on the way, resumes, and the model writes.

The demo runs the commands that a user would type, and prints each before it runs. The text is data/sample.jsonl
and the documentation that is part of every Python, so nothing is downloaded.
"""

import json
import os
import pydoc_data.topics
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from .commands import run, show, title

_WORK = Path("runs/demo")
_RUN = _WORK / "model"
_SHARDS = _WORK / "data"
_SAMPLE = Path("data/sample.jsonl")
_STEPS = 400
_SEQ_LEN = 128
_BATCH = 16
_SAVE_EVERY = 50
_KILL_AFTER_STEP = 130
_MODEL = "--hidden-size 256 --num-hidden-layers 4 --num-attention-heads 8 --num-key-value-heads 4"
_TRAINING = (
    f"--seq-len {_SEQ_LEN} --global-batch {_BATCH} --micro-batch {_BATCH} --steps {_STEPS} "
    f"--learning-rate 2e-3 --warmup-steps 20 --save-every {_SAVE_EVERY} --log-every 1"
)
_SAMPLING = "--max-new-tokens 48 --temperature 0.5"
_PROMPTS = ["What is photosynthesis?", "为什么天空是蓝色的？", "The for statement is used to"]


def main() -> None:
    """Run the demo in the current folder, which is the project's root."""
    if not _SAMPLE.is_file():
        sys.exit(f"error: {_SAMPLE}: not here; run the demo from the project's root")
    start = time.monotonic()
    shutil.rmtree(_WORK, ignore_errors=True)
    _WORK.mkdir(parents=True)

    title("1. Text to shards")
    documentation = _write_documentation()
    run("mm-data", "tokenize", str(_SAMPLE), str(documentation), "--out", str(_SHARDS))
    run("mm-data", "verify", str(_SHARDS))

    title(f"2. Train, and kill -9 after step {_KILL_AFTER_STEP}")
    options = f"{_MODEL} {_TRAINING}".split()
    killed_at = _run_and_kill(
        ["mm-train", "pretrain", "--shards", str(_SHARDS), "--run", str(_RUN), *options]
    )
    checkpoints = _checkpoints()
    print(f"killed after step {killed_at}; {_RUN / 'checkpoints'} holds {', '.join(checkpoints)}")

    title("3. Resume from the newest checkpoint")
    run("mm-train", "pretrain", "--run", str(_RUN), "--resume")
    metrics = _metrics()
    steps = [line["step"] for line in metrics]
    if steps != list(range(1, _STEPS + 1)):
        sys.exit(
            f"error: {_RUN / 'metrics.jsonl'} should have each of the steps 1 to {_STEPS} once; please report this"
        )

    title("4. Text from the model")
    for prompt in _PROMPTS:
        run("mm-train", "generate", "--run", str(_RUN), "--prompt", prompt, *_SAMPLING.split())

    title("What happened")
    first_loss, last_losses = metrics[0]["loss"], [line["loss"] for line in metrics[-20:]]
    speeds = sorted(line["tokens_per_second"] for line in metrics)
    dataset = json.loads((_SHARDS / "manifest.json").read_bytes())
    print(f"  tokens on disk   {sum(shard['tokens'] for shard in dataset['shards']):,}")
    print(
        f"  tokens trained   {_STEPS * _BATCH * _SEQ_LEN:,} in {_STEPS} steps, {speeds[len(speeds) // 2]:,.0f} tokens a second"
    )
    print(
        f"  loss             {first_loss:.2f} at step 1, {sum(last_losses) / len(last_losses):.2f} over the last {len(last_losses)} steps"
    )
    print(f"  killed           after step {killed_at}; resumed from {checkpoints[-1]}")
    print(f"  metrics.jsonl    has every step from 1 to {_STEPS} exactly once")
    print(f"  time             {time.monotonic() - start:.0f} s")
    title("What to try next")
    print('  .venv/bin/mm-data tokenize YOUR.jsonl --out data/yours  # a line: {"text": "…"}')
    print("  .venv/bin/mm-train pretrain --shards data/yours         # with MiniMind's settings")
    print('  .venv/bin/mm-train generate --run runs/pretrain --prompt "…"')


def _write_documentation() -> Path:
    """Write the topics of pydoc as JSON lines."""
    path = _WORK / "python_documentation.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for text in pydoc_data.topics.topics.values():
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    return path


def _run_and_kill(command: list[str]) -> int:
    """Start training, wait for the step, kill the process; return its last finished step."""
    process = subprocess.Popen(show(command))
    while process.poll() is None and (not (metrics := _metrics()) or metrics[-1]["step"] < _KILL_AFTER_STEP):
        time.sleep(0.05)
    if process.poll() is not None:
        sys.exit(f"error: training ended with status {process.returncode} before it could be killed")
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    return int(_metrics()[-1]["step"])


def _metrics() -> list[dict[str, Any]]:
    """Return the complete lines of metrics.jsonl; the last may be half-written while training runs."""
    path = _RUN / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _checkpoints() -> list[str]:
    """Return the names of the complete checkpoints, the newest last; one that was being written ends in .partial."""
    return sorted(path.name for path in (_RUN / "checkpoints").iterdir() if not path.suffix)


if __name__ == "__main__":
    main()
