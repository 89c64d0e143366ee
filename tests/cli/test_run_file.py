"""A run described in a TOML file, and the run.toml of a run folder that repeats it."""

import json
import shutil
import tomllib

import pytest

from minimind_data.options import flatten, leaves, options_from
from minimind_train.run.options import DpoOptions, PretrainOptions, SftOptions
from minimind_train.run.toml import describe, read_description, typed_options
from minimind_train.run_folder import checkpoint
from minimind_train.run_folder.record import Change, RunRecord
from tests.helpers.commands import TINY, mm_train


def results(run):
    """The weights of all checkpoints, and the metrics but for what no two runs share."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    weights = {
        step: (checkpoint.folder_of(run, step) / "model.safetensors").read_bytes()
        for step in checkpoint.steps_of(run)
    }
    return weights, [{**line, "tokens_per_second": 0} for line in lines]


OPTIONS = [*TINY, "--steps", 4, "--dropout", 0.1, "--learning-rate", 0.01, "--seed", 7, "--log-every", 1]


@pytest.mark.parametrize(
    "more",
    [
        ["--layout", "pack", "--long-documents", "fragment", "--skip-positions", "3:5"],
        ["--layout", "concat", "--save-every", 2, "--val-every", 2, "--save-best", "--val-shards", "DATASET"],
        ["--shards", "zh=DATASET:0.7", "--shards", "en=DATASET:0.3"],
        ["--preset", "minimind2-small", "--steps", 2],
    ],
)
def test_a_run_folder_holds_what_repeats_the_run_bit_for_bit(training_data, tmp_path, more):
    once, again = tmp_path / "once", tmp_path / "again"
    more = [str(word).replace("DATASET", str(training_data)) for word in more]
    shards = [] if "--shards" in more else ["--shards", training_data]
    result = mm_train("pretrain", "--run", once, *shards, *OPTIONS, *more)
    assert result.exit_code == 0, result.stderr
    result = mm_train("pretrain", "--config", once / "run.toml", "--run", again)
    assert result.exit_code == 0, result.stderr
    assert results(again) == results(once)
    assert RunRecord.read(again) == RunRecord.read(once)
    assert (again / "run.toml").read_text() == (once / "run.toml").read_text()


def test_the_command_line_wins_over_the_file(training_data, tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text(
        f"""
        preset = "minimind2-small"
        shards = "{training_data}"
        seq-len = 32
        hidden_size = 32
        intermediate_size = 64
        num_hidden_layers = 1
        global_batch = 4
        steps = 9
        device = "cpu"
        skip_positions = ["3:4", "7:9"]
        qk_norm = true
        learning_rate = 1
        """
    )
    result = mm_train("pretrain", "--config", file, "--run", tmp_path / "run", "--steps", 1, "--no-qk-norm")
    assert result.exit_code == 0, result.stderr
    options = RunRecord.read(tmp_path / "run").options
    assert (options["steps"], options["epochs"], options["qk_norm"]) == (1, None, False)
    assert (options["hidden_size"], options["num_attention_heads"]) == (32, 8)
    assert options["rms_norm_eps"] == 1e-5, "what the preset says and nothing else does"
    assert options["skip_positions"] == ["3:4", "7:9"]
    assert options["learning_rate"] == 1.0
    epochs = [
        "--config",
        tmp_path / "run" / "run.toml",
        "--run",
        tmp_path / "epochs",
        "--epochs=1",
        "--max-hours",
        1e-9,
    ]
    assert mm_train("pretrain", *epochs).exit_code == 124
    options = RunRecord.read(tmp_path / "epochs").options
    assert (options["steps"], options["epochs"]) == (None, 1), "either of them is the length of the run"
    sized = ["--preset", "minimind2-small", "--config", file]
    result = mm_train("pretrain", *sized, "--run", tmp_path / "sized", "--steps", 1, "--num-hidden-layers", 1)
    assert result.exit_code == 0, result.stderr
    assert RunRecord.read(tmp_path / "sized").options["hidden_size"] == 512, (
        "a preset that is passed is passed"
    )


def test_with_resume_a_file_is_held_against_the_run_like_flags(training_data, tmp_path):
    run, file = tmp_path / "run", tmp_path / "mine.toml"
    assert mm_train("pretrain", "--run", run, "--shards", training_data, *OPTIONS).exit_code == 0
    same = mm_train("pretrain", "--run", run, "--resume", "--config", run / "run.toml")
    assert same.exit_code == 0, same.stderr
    file.write_text("learning_rate = 0.5")
    other = mm_train("pretrain", "--run", run, "--resume", "--config", file)
    assert other.exit_code == 1
    assert "learning_rate (in the run: 0.01, asked for: 0.5)" in other.stderr
    more = ["--steps", 5, "--allow-change", "steps"]
    assert mm_train("pretrain", "--run", run, "--resume", *more).exit_code == 0
    text = (run / "run.toml").read_text()
    assert "# Not so from the beginning: steps was 4 up to step 4." in text
    assert tomllib.loads(text)["steps"] == 5


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("learning_rat = 1", "learning_rat is no option of a run; did you mean learning_rate?"),
        ("zzzz = 1", "zzzz is no option of a run; see --help"),
        ("resume = true", "resume is no option of a run"),
        ("[model]\nhidden_size = 8", "[model] begins a section, and there are none"),
        ("seq-len = 8\nseq_len = 9", "seq_len stands there twice"),
        ('command = "sft"', "is for mm-train sft, not pretrain"),
        ('preset = "gpt-5"', "no preset 'gpt-5'; there are minimind-3"),
        ("steps = ", "no TOML"),
        ("steps = 'many'", "steps"),
        ("steps = true", "steps takes no true or false"),
        ("steps = [1]", "steps takes no list"),
        ("steps = 2.5", "mine.toml: steps is 2.5, where a whole number is wanted"),
        ("learning_rate = nan", "mine.toml: learning_rate is nan, where a number is wanted"),
        ("seed = 2024-01-01", "mine.toml: seed is datetime.date(2024, 1, 1), where a whole number"),
        ("shards = {a = 1}", "mine.toml: shards[0] is an object, where a text is wanted"),
        ("sample_prompt = [['a']]", "mine.toml: sample_prompt[0] is a list, where a text is wanted"),
        ("preset = [1]", "no preset [1]"),
        ("layout = 'heap'", "concat"),
        ("hidden_size = 7", "does not divide"),
        ("epochs = 1\nsteps = 1", "pass one of them"),
    ],
)
def test_what_a_file_cannot_say_is_wrong_usage(tmp_path, text, complaint):
    file = tmp_path / "mine.toml"
    file.write_text(text)
    result = mm_train("pretrain", "--config", file, "--run", tmp_path / "run")
    assert result.exit_code == 2, result.stderr
    assert complaint in " ".join(result.stderr.split())
    assert not (tmp_path / "run").exists()


def test_a_fraction_that_is_whole_is_a_whole_number(training_data, tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text(f'shards = "{training_data}"\nsteps = 1e5\ntrack = "wandb"\nsave_every = 2.0')
    result = mm_train("pretrain", "--config", file, "--run", tmp_path / "run", *OPTIONS, "--track", "none")
    assert "track must be" in result.stderr.replace("--", ""), "so all else has been read"
    values = typed_options(
        file, {"steps": 1e5, "track": "wandb", "max_hours": 2.0, "seed": "7"}, PretrainOptions
    )
    assert values == {"steps": 100_000, "track": "wandb", "max_hours": 2.0, "seed": "7"}
    assert type(values["steps"]) is int
    assert type(values["max_hours"]) is float


@pytest.mark.parametrize("mixed", [False, True])
def test_the_file_of_a_run_that_has_moved_finds_what_has_moved_with_it(
    training_data, tmp_path, monkeypatch, mixed
):
    there, here = tmp_path / "there", tmp_path / "a" / "here"
    shutil.copytree(training_data, there / "data")
    shards = f"one={there / 'data'}:1" if mixed else there / "data"
    arguments = ["--shards", shards, "--val-shards", there / "data", *OPTIONS]
    assert mm_train("pretrain", "--run", there / "runs" / "run", *arguments).exit_code == 0
    here.parent.mkdir()
    there.rename(here)
    monkeypatch.chdir(tmp_path)
    config = here / "runs" / "run" / "run.toml"
    result = mm_train("pretrain", "--config", config, "--run", tmp_path / "again")
    assert result.exit_code == 0, result.stderr
    assert f"is read from {here / 'data'}" in result.stderr
    assert results(tmp_path / "again") == results(here / "runs" / "run")
    edited = config.read_text().replace(str(there / "data"), str(tmp_path / "nowhere"))
    config.write_text(edited)
    result = mm_train("pretrain", "--config", config, "--run", tmp_path / "third")
    assert result.exit_code == 1
    assert "nowhere" in result.stderr, "what somebody wrote is not looked for elsewhere"


def test_a_file_that_cannot_be_read_is_wrong_usage(tmp_path):
    for path, complaint in ((tmp_path / "none.toml", "No such file"), (tmp_path, "Is a directory")):
        result = mm_train("pretrain", "--config", path)
        assert result.exit_code == 2
        assert complaint in " ".join(result.stderr.split())
    (tmp_path / "latin.toml").write_bytes(b'run = "\xe9"')
    with pytest.raises(ValueError, match="no TOML"):
        read_description(tmp_path / "latin.toml", "pretrain", ["run"])


@pytest.mark.parametrize(
    ("command", "kind"), [("pretrain", PretrainOptions), ("sft", SftOptions), ("dpo", DpoOptions)]
)
def test_what_is_described_is_read_again_whatever_the_phase(tmp_path, command, kind):
    odd = 'a "b"\\c\nd\te\x7f 北京'
    config = options_from(
        kind, {"shards": (odd,), "learning_rate": 1e-30, "weight_decay": 0.0, "seed": 2**64 - 1}
    )
    file = tmp_path / "run.toml"
    file.write_text(describe(config, [Change(step=3, name="x", old="a\nb = 1", new=1)]), encoding="utf-8")
    names = {name for name, _, _ in leaves(kind)}
    told = read_description(file, command, names)
    here = flatten(config)
    left_out = {name for name in names if here[name] is None} | {"run"}
    assert names - told.keys() - {"long_documents"} == left_out
    assert told.pop("shards") == odd
    assert all(
        told[name] == (list(here[name]) if isinstance(here[name], tuple) else here[name]) for name in told
    )
