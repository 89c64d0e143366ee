"""A run from Python: begun by flat options, watched, stopped, resumed, opened and asked, without a word of the command line."""

import re
import shutil
import threading
from functools import partial
from pathlib import Path

import pytest

from minimind_data.errors import UserError
from minimind_data.windows.opening import open_windows
from minimind_train import (
    DpoOptions,
    GenerateOptions,
    PretrainOptions,
    SftOptions,
    begin,
    complete,
    export,
    locate,
    open_run,
    resume,
)
from minimind_train.parallel.interrupt import Stop
from minimind_train.run_folder import checkpoint
from tests.helpers.runs import OPTIONS, Said, metrics, records, weights


@pytest.fixture
def options(tmp_path, small_dataset):
    return PretrainOptions.of(**OPTIONS, shards=str(small_dataset), run=str(tmp_path / "run"), dropout=0.1)


def test_options_by_their_flat_names():
    options = SftOptions.of(
        run="runs/x", shards=["a=one:1", "b=two:2"], hidden_size=16, skip_positions=["3:5"]
    )
    assert options.training.run == Path("runs/x")
    assert options.data.shards == ("a=one:1", "b=two:2")
    assert options.data.layout == "pad"
    assert options.data.skip_positions == ("3:5",)
    assert options.optim.learning_rate == SftOptions().optim.learning_rate
    assert DpoOptions.of() == DpoOptions()
    with pytest.raises(
        UserError, match=r"^learning_rat is no option of sft; did you mean `learning_rate`\?$"
    ):
        SftOptions.of(learning_rat=1)
    with pytest.raises(
        UserError, match=r"qqqq is no option of pretrain; its options are the fields of PretrainOptions"
    ):
        PretrainOptions.of(qqqq=1)
    with pytest.raises(ValueError, match="`steps` must be from"):
        PretrainOptions.of(steps=-1)


def test_every_step_is_seen(options, whole_run, tmp_path):
    seen = []
    outcome = begin(options, Said(), on_step=seen.append)
    assert outcome.step == len(seen) == 12
    timeless = [{**record, "tokens_per_second": 0} for record in seen]
    assert timeless == metrics(tmp_path / "run") == metrics(whole_run)
    for record in seen:
        record.clear()  # its own
    assert weights(tmp_path / "run", 12) == weights(whole_run, 12)


def test_it_is_stopped_and_goes_on_as_if_it_had_not_been(options, whole_run, tmp_path):
    run, seen, enough = tmp_path / "run", [], threading.Event()

    def watch(record):
        seen.append(record["step"])
        if record["step"] == 5:
            enough.set()

    outcome = begin(options, Said(), on_step=watch, stop=enough.is_set)
    assert (outcome.step, outcome.stopped_by, outcome.stopped_by.what) == (5, Stop.CALLER, "its caller")
    assert checkpoint.steps_of(run)[-1] == 5
    outcome = resume(str(run), say=Said(), on_step=watch)
    assert (outcome.step, outcome.stopped_by) == (12, None)
    assert seen == list(range(1, 13))
    assert weights(run, 12) == weights(whole_run, 12)


def test_what_watches_fails_and_the_run_goes_on_later(options, whole_run, tmp_path):
    def watch(record):
        if record["step"] == 8:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        begin(options, Said(), on_step=watch)
    assert checkpoint.steps_of(tmp_path / "run")[-1] == 6
    resume(tmp_path / "run", say=Said())
    assert weights(tmp_path / "run", 12) == weights(whole_run, 12)


def test_an_option_that_is_none_is_refused_at_a_resume(stopped_run):
    with pytest.raises(UserError, match=r"seeed is no option of pretrain; did you mean `seed`\?"):
        resume(stopped_run, {"seeed": 3}, say=Said())


AT_ONCE = partial(bool, 1)  # which another process can have too


@pytest.mark.distributed
def test_rank_0_is_watched(tmp_path, small_dataset):
    options = PretrainOptions.of(**OPTIONS, shards=str(small_dataset), run=tmp_path / "run", nproc=2)
    with pytest.raises(UserError, match="called in another process, .*; pass functions of a module as `say`"):
        begin(options, print, on_step=lambda record: None)
    assert not (tmp_path / "run").exists()
    outcome = begin(options, print, on_step=print, stop=AT_ONCE)
    assert (outcome.step, outcome.stopped_by) == (1, Stop.CALLER)
    assert resume(tmp_path / "run", say=print).step == 12


def test_a_run_is_opened(whole_run):
    trained = open_run(str(whole_run), checkpoint=9, device="cpu", say=Said())
    assert (trained.options.command, trained.options.training.steps, trained.step) == ("pretrain", 12, 9)
    assert re.fullmatch(
        rf"OpenRun\('{whole_run}': pretrain, step 9, 0\.0\d M parameters, Tokenizer\(.*\)\)", repr(trained)
    )
    options = GenerateOptions(max_new_tokens=8, seed=3)
    text = "".join(trained.complete("the", options))
    assert text == "".join(complete(whole_run, "the", options, checkpoint=9, device="cpu", say=Said()))
    assert text != "".join(open_run(whole_run, checkpoint=3, device="cpu").complete("the", options))
    with pytest.raises(UserError, match="has no chat template"):
        trained.chat()


def test_a_chat_with_an_opened_run(chat_base):
    trained = open_run(chat_base, device="cpu", say=Said())
    answers = ["".join(trained.chat(GenerateOptions(max_new_tokens=4)).answer("hello")) for _ in range(2)]
    assert answers[0] == answers[1]


def test_what_a_run_reads(whole_run, small_dataset):
    trained = open_run(whole_run, device="cpu", say=Said())
    for position in (0, 17, 500):
        place = locate(str(whole_run), position)
        assert (place["epoch"], place["window"]) == trained.order.window(position)
        assert (place["shard"], place["offset"]) == trained.windows.locate(place["window"])
    windows = open_windows(trained.windows.shards, layout="concat", seq_len=16)
    assert windows[3]["input_ids"].tolist() == trained.windows[3]["input_ids"].tolist()


def test_a_foreign_folder_is_opened(whole_run, tmp_path):
    pytest.importorskip("transformers")
    export(whole_run, tmp_path / "hf", to="hf", say=Said())
    for name in ("tokenizer.json",):
        shutil.copy(whole_run / name, tmp_path / "hf" / name)
    trained = open_run(tmp_path / "hf", device="cpu", say=Said())
    assert (trained.options, trained.step) == (None, None)
    assert "Hugging Face model, 0.0" in repr(trained)
    options = GenerateOptions(max_new_tokens=8)
    assert "".join(trained.complete("the", options)) == "".join(
        open_run(whole_run, device="cpu").complete("the", options)
    )
    with pytest.raises(UserError, match="hf: is no run, so it reads nothing"):
        len(trained.windows)


def test_a_left_out_position_says_so(options, tmp_path):
    begin(options, Said(), stop=AT_ONCE)
    resume(tmp_path / "run", {"skip_positions": ["20:24"]}, say=Said())
    assert locate(tmp_path / "run", 21)["left_out"] is True
    assert "left_out" not in locate(tmp_path / "run", 24)
    assert records(tmp_path / "run" / "metrics.jsonl")[-1]["step"] == 12
