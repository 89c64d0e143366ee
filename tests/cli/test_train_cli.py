"""mm-train as a user calls it: its options, what it says and where, exit statuses, and runs from begin to resume."""

import json
import re
import shlex

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from minimind_cli import data
from minimind_data.dataset.shard_set import ShardSet
from minimind_data.windows.opening import open_windows
from minimind_train.objectives.objective import NextToken
from minimind_train.order.sample_order import SampleOrder
from minimind_train.run_folder.record import RunRecord
from tests.helpers.commands import TINY, mm_train


@pytest.fixture(scope="module")
def run(tmp_path_factory, training_data):
    run = tmp_path_factory.mktemp("runs") / "small"
    result = mm_train(
        "pretrain",
        "--shards",
        training_data,
        "--run",
        run,
        *TINY,
        "--steps",
        4,
        "--log-every",
        2,
        "--save-every",
        2,
    )
    assert result.exit_code == 0, result.stderr
    return run


def test_every_option_of_the_contract_is_there():
    said = mm_train("pretrain", "--help").stdout
    for flag in [
        "shards",
        "run",
        "resume",
        "allow-change",
        "resume-from",
        "order",
        "seq-len",
        "layout",
        "long-documents",
        "shuffle-block",
        "skip-positions",
        "reweight-at-resume",
        "val-shards",
        "val-every",
        "val-batches",
        "global-batch",
        "micro-batch",
        "epochs",
        "steps",
        "device",
        "dtype",
        "seed",
        "learning-rate",
        "warmup-steps",
        "save-every",
        "log-every",
        "hidden-size",
        "num-hidden-layers",
        "num-attention-heads",
        "num-key-value-heads",
        "keep",
        "keep-every",
        "track",
        "track-project",
        "sample-every",
        "sample-prompt",
        "sample-tokens",
        "config",
        "save-best",
        "max-hours",
        "on-nonfinite",
        "threads",
        "tie-word-embeddings",
        "dropout",
        "qk-norm",
    ]:
        assert re.search(rf"--{flag}\b", said), flag
    assert "--vocab-size" not in said


def test_a_run_says_what_it_does_on_stderr_and_nothing_on_stdout(training_data, tmp_path):
    run = tmp_path / "run"
    result = mm_train("pretrain", "--shards", training_data, "--run", run, *TINY, "--steps", 2)
    assert result.exit_code == 0
    assert result.stdout == ""
    assert "step 2/2  loss" in result.stderr
    assert "done, 2 steps, last loss" in result.stderr
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [1, 2]


def test_a_preset_is_what_nothing_else_says(training_data, tmp_path):
    run = tmp_path / "run"
    begin = ["pretrain", "--shards", training_data, "--run", run, "--preset", "minimind2-moe", *TINY]
    result = mm_train(*begin, "--intermediate-size", 24, "--n-shared-experts", 2, "--steps", 2)
    assert result.exit_code == 0, result.stderr
    assert re.search(r"^Model Params: 0\.\d\dM", result.stderr, re.MULTILINE)
    options = json.loads((run / "config.json").read_text())["options"]
    named = ("hidden_size", "num_key_value_heads", "intermediate_size", "n_shared_experts")
    assert [options[name] for name in named] == [16, 1, 24, 2]
    assert (options["use_moe"], options["num_experts_per_tok"], options["qk_norm"]) == (True, 2, False)
    again = mm_train("pretrain", "--run", run, "--resume", "--preset", "minimind-3")
    assert again.exit_code == 1
    assert "hidden_size (in the run: 16, asked for: 768)" in again.stderr
    unknown = mm_train(*begin, "--preset", "minimind-4")
    assert unknown.exit_code == 2
    assert "no such preset; there are minimind-3, minimind-3-moe, minimind2-small" in re.sub(
        r"\s+", " ", unknown.stderr
    )


def test_a_second_start_is_refused_and_a_second_resume_does_nothing(run, training_data):
    result = mm_train("pretrain", "--shards", training_data, "--run", run, *TINY, "--steps", 4)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert "--resume" in result.stderr
    result = mm_train("pretrain", "--run", run, "--resume")
    assert result.exit_code == 0
    assert "finished already, 4 steps" in result.stderr


def test_only_what_stands_on_the_command_line_is_held_against_the_run(run, training_data):
    assert mm_train("pretrain", "--run", run, "--resume", *TINY, "--steps", 4).exit_code == 0
    result = mm_train("pretrain", "--run", run, "--resume", "--learning-rate", 1, "--seed", 7)
    assert result.exit_code == 1
    assert "learning_rate (in the run: 0.0005, asked for: 1.0)" in result.stderr
    assert "--allow-change learning_rate --allow-change seed" in result.stderr
    assert "Traceback" not in result.stderr


def test_an_allowed_change_goes_on(training_data, tmp_path):
    begin = ["pretrain", "--shards", training_data, "--run", tmp_path / "run"]
    assert mm_train(*begin, *TINY, "--steps", 2).exit_code == 0
    result = mm_train(
        "pretrain", "--run", tmp_path / "run", "--resume", "--steps", 3, "--allow-change", "steps"
    )
    assert result.exit_code == 0
    assert "done, 3 steps" in result.stderr


def test_a_mixture_is_one_shards_for_each_part(training_data, tmp_path):
    run = ["pretrain", "--run", tmp_path / "run"]
    parts = ["--shards", f"zh={training_data}:0.7", "--shards", f"en={training_data}:0.3"]
    result = mm_train(*run, *parts, *TINY, "--steps", 5)
    assert result.exit_code == 0, result.stderr
    assert "zh: 7 of 10 windows" in result.stderr
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["epochs"]["zh"] > last["epochs"]["en"] > 0
    again = [*run, "--resume", "--steps", 6, "--allow-change", "steps"]
    parts = ["--shards", f"zh={training_data}:1", "--shards", f"en={training_data}:1"]
    refused = mm_train(*again, *parts)
    assert refused.exit_code == 1
    assert "weights (in the run: en=0.3 zh=0.7, asked for: en=0.5 zh=0.5)" in refused.stderr
    result = mm_train(*again, *parts, "--reweight-at-resume")
    assert result.exit_code == 0, result.stderr
    assert "zh: 1 of 2 windows" in result.stderr


def test_a_run_says_where_its_positions_lie_with_all_that_changed(training_data, tmp_path):
    run = tmp_path / "run"
    parts = [f"zh={training_data}:0.7", f"en={training_data}:0.3"]
    shards = [word for part in parts for word in ("--shards", part)]
    begin = ["--steps", 3, "--skip-positions", "5:7", "--shuffle-block", 3, "--seed", 5]
    assert mm_train("pretrain", "--run", run, *shards, *TINY, *begin).exit_code == 0
    other = ["--shards", f"zh={training_data}:0", "--shards", f"en={training_data}:1", "--reweight-at-resume"]
    more = ["--steps", 4, "--allow-change", "steps"]
    assert mm_train("pretrain", "--run", run, "--resume", *other, *more).exit_code == 0

    def located(position, *words):
        result = CliRunner().invoke(
            data.app, ["locate", *map(str, words), "--position", str(position), "--json"]
        )
        assert result.exit_code == 0, result.stderr
        return json.loads(result.stdout)

    flags = [*parts, "--seq-len", 32, "--shuffle-block", 3, "--seed", 5]
    told = [located(position, "--run", run) for position in range(18)]
    assert [one.pop("left_out", False) for one in told] == [position in {5, 6} for position in range(18)]
    assert told[:14] == [located(position, *flags) for position in range(14)]
    assert {one["part"] for one in told[14:]} == {"en"}
    words = ["locate", "--run", str(run), "--position", "5"]
    assert CliRunner().invoke(data.app, words).stdout.splitlines()[0].endswith("left out")
    for wrong in (["--seed", "5"], ["--seq-len", "8"], [str(training_data)]):
        assert CliRunner().invoke(data.app, [*words, *wrong]).exit_code == 2
    missing = CliRunner().invoke(data.app, ["locate", "--position", "5", str(training_data)])
    assert missing.exit_code == 2
    assert "pass DIR and --seq-len" in " ".join(missing.stderr.split())


def test_a_run_older_than_some_options_says_where_its_positions_lie_too(training_data, tmp_path):
    run = tmp_path / "run"
    assert mm_train("pretrain", "--run", run, "--shards", training_data, *TINY, "--steps", 1).exit_code == 0
    words = ["locate", "--run", str(run), "--position", "5", "--json"]
    today = CliRunner().invoke(data.app, words).stdout
    record = RunRecord.read(run)
    for name in ("shuffle_block", "skip_positions", "mixture_stages", "document_mask", "tf32"):
        del record.options[name]
    record.write(run)
    assert CliRunner().invoke(data.app, words).stdout == today
    assert json.loads(today)["position"] == 5


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--shards", "data/zh", "--shards", "en=data/en:1"], "NAME=DIR:WEIGHT"),
        (["--reweight-at-resume"], "needs --resume"),
        (["--resume", "--reweight-at-resume"], "needs --resume, and every part"),
        (["--skip-positions", "9:8"], "--skip-positions must be A:B"),
        (["--epochs", "1", "--steps", "1"], "pass one of them"),
        (["--resume-from", "text-00000:1"], "needs --order sequential"),
        (["--resume-from", "text-00000"], "must be SHARD:OFFSET"),
        (["--allow-change", "seed"], "is for --resume"),
        (["--resume", "--allow-change", "sed"], "not an option that may change; name one of"),
        (["--hidden-size", "7"], "does not divide"),
        (["--layout", "heap"], "concat"),
        (["--track", "wandbb"], "--track must be tensorboard, wandb, swanlab, not 'wandbb'"),
        (["--sample-tokens", "0"], "--sample-tokens must be from 1"),
        (["--long-documents", "lose"], "fragment"),
        (["--seq-len", "0"], "--seq-len must be at least 1"),
        (["--global-batch", "1000000000000"], "--global-batch must be from 1 to 1048576, not 1000000000000"),
        (["--steps", "1" + "0" * 400], "--steps must be from"),
        (["--num-hidden-layers", "1000000"], "--num-hidden-layers must be from"),
        (["--learning-rate", "nan"], "--learning-rate must be"),
    ],
)
def test_wrong_usage_is_status_2(arguments, complaint, tmp_path):
    result = mm_train("pretrain", "--run", tmp_path / "run", *arguments)
    assert result.exit_code == 2
    assert complaint in " ".join(result.stderr.split())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("arguments", [["--shards", "nowhere"], ["--resume"]])
def test_what_cannot_be_done_is_status_1_and_one_sentence(arguments, tmp_path):
    result = mm_train("pretrain", "--run", tmp_path / "run", *arguments)
    assert result.exit_code == 1
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_a_run_writes_after_a_prompt(run):
    arguments = ["generate", "--run", run, "--prompt", "问题", "--max-new-tokens", 8, "--device", "cpu"]
    result = mm_train(*arguments)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.endswith("\n")
    assert len(result.stdout) > 1
    assert mm_train(*arguments).stdout == result.stdout
    assert mm_train(*arguments, "--seed", 1).stdout != result.stdout
    assert mm_train(*arguments, "--temperature", 0).exit_code == 0
    earlier = mm_train(*arguments, "--checkpoint", 2)
    assert earlier.exit_code == 0
    greedy = [*arguments, "--temperature", 0, "--max-new-tokens", 4]
    stretched = mm_train(*greedy, "--inference-rope-scaling", "--yarn-original-max-position-embeddings", 8)
    assert stretched.exit_code == 0
    refused = mm_train(*greedy, "--inference-rope-scaling", "--yarn-factor", 0)
    assert refused.exit_code == 2
    assert "--yarn-factor must be from 1" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "status", "complaint"),
    [
        (["--checkpoint", "3"], 1, "no checkpoint of step 3; there are: 2, 4"),
        (["--checkpoint", "best"], 1, "no checkpoint has a validation loss"),
        (["--checkpoint", "newest"], 2, "names no checkpoint"),
        (["--top-p", "2"], 2, "--top-p must"),
        (["--run", "nowhere"], 1, "nowhere: no run"),
    ],
)
def test_what_generate_cannot_do(run, arguments, status, complaint):
    result = mm_train("generate", "--run", run, "--prompt", "x", *arguments)
    assert result.exit_code == status
    assert complaint in result.stderr


def test_a_run_is_measured_as_it_learns_and_from_outside(training_data, tmp_path):
    run = tmp_path / "run"
    validation = ["--val-shards", training_data, "--val-every", 2, "--val-batches", 3]
    result = mm_train("pretrain", "--shards", training_data, "--run", run, *TINY, "--steps", 3, *validation)
    assert result.exit_code == 0, result.stderr
    assert "step 2/3  validation loss" in result.stderr
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    result = mm_train(
        "eval", "--run", run, "--shards", training_data, "--windows", 12, "--device", "cpu", "--json"
    )
    assert result.exit_code == 0, result.stderr
    told = json.loads(result.stdout)
    assert told["loss"] == pytest.approx(last["val_loss"], rel=1e-4)
    assert {f"val_{name}" for name in told} <= last.keys()
    plain = mm_train(
        "eval", "--run", run, "--shards", training_data, "--windows", 12, "--device", "cpu"
    ).stdout
    assert f"loss {told['loss']:.4f}" in plain
    assert "bits a byte" in plain


def test_a_run_whose_time_is_up_says_how_it_goes_on(training_data, tmp_path):
    run = tmp_path / "run"
    begin = ["pretrain", "--shards", training_data, "--run", run, *TINY, "--steps", 50]
    stopped = mm_train(*begin, "--max-hours", 1e-9, "--log-every", 1)
    assert stopped.exit_code == 124
    assert "stopped by --max-hours after step 1 of 50, which is saved" in stopped.stderr
    assert f"go on with: mm-train pretrain --run {run} --resume" in stopped.stderr
    again = mm_train("pretrain", "--run", run, "--resume")
    assert again.exit_code == 124, "the limit is one of the run's options"
    assert "after step 2 of 50" in again.stderr
    assert mm_train("pretrain", "--run", run, "--resume", "--max-hours", 0).exit_code == 0


def test_the_commands_of_a_loss_that_is_no_number_work(training_data, tmp_path, monkeypatch):
    run = tmp_path / "my run"
    real = NextToken.forward

    def spoiled(self, micro_batch):
        found = real(self, micro_batch)
        bad = (micro_batch["input_ids"] == window["input_ids"][0]).all(1).any()
        return found._replace(summed=found.summed / (~bad))

    windows = open_windows(ShardSet.open(training_data), layout="concat", seq_len=32)
    window = windows.fetch(np.array([SampleOrder(num_windows=len(windows), seed=42).window(9)[1]]))
    window = {name: torch.from_numpy(array) for name, array in window.items()}
    monkeypatch.setattr(NextToken, "forward", spoiled)
    begin = ["pretrain", "--shards", training_data, "--run", run, *TINY, "--steps", 4, "--save-every", 1]
    result = mm_train(*begin)
    assert result.exit_code == 1
    assert "the loss is inf at step 3, from position 9 of the positions 8 to 11" in result.stderr
    look, leave_out = re.findall("`(mm-[^`]*)`", result.stderr)
    _, *words = shlex.split(look)
    located = CliRunner().invoke(data.app, words)
    assert located.exit_code == 0
    assert "position 9: " in located.stdout
    _, *words = shlex.split(re.search(r"show it with: (.*)", located.stdout)[1])
    shown = CliRunner().invoke(data.app, [*words, "--json"])
    assert json.loads(shown.stdout)["input_ids"] == window["input_ids"][0].tolist()
    _, *words = shlex.split(leave_out)
    assert mm_train(*words).exit_code == 0
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert records[-1]["step"] == 4


@pytest.mark.parametrize(
    ("arguments", "status", "complaint"),
    [
        (["--shards", "nowhere"], 1, "nowhere: no dataset"),
        (["--shards", "DATASET", "--checkpoint", "3"], 1, "no checkpoint of step 3"),
        (["--shards", "DATASET", "--windows", "0"], 2, "windows"),
    ],
)
def test_what_eval_cannot_do(run, training_data, arguments, status, complaint):
    result = mm_train(
        "eval", "--run", run, *(training_data if word == "DATASET" else word for word in arguments)
    )
    assert result.exit_code == status
    assert complaint in result.stderr


def test_a_run_is_exported(run, tmp_path):
    for target, written in (("hf", "model.safetensors"), ("minimind", "pretrain_16.pth")):
        result = mm_train(
            "export", "--run", run, "--to", target, "--out", tmp_path / target, "--checkpoint", 2
        )
        assert result.exit_code == 0, result.stderr
        assert result.stdout == ""
        assert "Model Params: 0.1" in result.stderr
        assert (tmp_path / target / written).is_file()
    asked = mm_train("generate", "--run", tmp_path / "hf", "--prompt", "问题", "--max-new-tokens", 4)
    assert asked.exit_code == 0, asked.stderr
    again = mm_train("export", "--run", run, "--to", "hf", "--out", tmp_path / "hf")
    assert again.exit_code == 1
    assert "not empty; take another --out" in again.stderr
    assert mm_train("export", "--run", run, "--to", "onnx", "--out", tmp_path / "onnx").exit_code == 2


def test_an_unknown_command_is_named():
    result = mm_train("pretain")
    assert result.exit_code == 2
    assert "pretain" in result.stderr
