"""A run that begins from weights that were trained before."""

import shutil

import pytest
import torch
from safetensors.torch import load_file

from minimind_data.errors import UserError
from minimind_train.run import entry
from minimind_train.run.entry import resume
from minimind_train.run.options import PretrainOptions, changeable
from minimind_train.run_folder import checkpoint
from minimind_train.run_folder.record import RunRecord
from minimind_train.run_folder.tensors import MODEL_NAME
from minimind_train.weights.loading import checksum_of_tensors, load_weights
from tests.helpers.datasets import chat_dataset, retokenized
from tests.helpers.runs import Said, config_of, metrics, stop_after, weights

SHAPE = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)


@pytest.fixture
def tuned(tmp_path, whole_run, other_dataset):
    """Begin a run from the whole run's weights, and say nothing of the model's shape."""

    def tuned(name="tuned", names_given=None, **changes):
        plain = PretrainOptions().model
        usual = {option: getattr(plain, option) for option in SHAPE}
        options = {**usual, "from_weight": str(whole_run), "keep": 0, "dropout": 0.1, **changes}
        config = config_of(tmp_path / name, options.pop("shards", other_dataset), **options)
        return entry.begin(config, Said(), names_given=names_given)

    return tuned


def stored(run, step):
    return load_file(checkpoint.folder_of(run, step) / MODEL_NAME)


def test_the_first_step_moves_the_weights_that_were_there(tuned, tmp_path, whole_run):
    tuned(steps=1, learning_rate=1e-12, weight_decay=0.0)
    before, after = stored(whole_run, 12), stored(tmp_path / "tuned", 1)
    assert before.keys() == after.keys()
    assert all(torch.allclose(before[name], after[name], atol=1e-9) for name in before)
    record = RunRecord.read(tmp_path / "tuned")
    then = RunRecord.read(whole_run)
    assert all(record.options[name] == then.options[name] for name in (*SHAPE, "vocab_size", "head_dim"))
    assert record.options["from_weight"] == str(whole_run.resolve())
    assert record.options["from_step"] == 12
    assert record.options["from_sha256"] == checksum_of_tensors(before)


def test_any_checkpoint_of_the_run(tuned, tmp_path, whole_run):
    tuned(steps=1, from_step=6)
    assert RunRecord.read(tmp_path / "tuned").options["from_sha256"] == checksum_of_tensors(
        stored(whole_run, 6)
    )
    with pytest.raises(UserError, match=r"no checkpoint of step 7; there are: 3, 6, 9, 12"):
        tuned("other", from_step=7)
    with pytest.raises(ValueError, match="`from_step` says which checkpoint of `from_weight`"):
        tuned("other", from_weight=None, from_step=6)


def test_a_flag_that_contradicts_the_weights_is_refused_with_both_sides(tuned, tmp_path):
    with pytest.raises(UserError, match=r"its hidden_size is 16, and `hidden_size` says 32"):
        tuned(hidden_size=32)
    # Written is written, though it is what stands there without a word.
    with pytest.raises(UserError, match=r"its hidden_size is 16, and `hidden_size` says 768"):
        tuned(names_given={"hidden_size"})
    assert not (tmp_path / "tuned").exists()
    tuned(names_given={"hidden_size", "rope_theta", "steps"}, hidden_size=16, rope_theta=5e5, steps=1)
    options = RunRecord.read(tmp_path / "tuned").options
    assert (options["rope_theta"], options["dropout"], options["hidden_size"]) == (5e5, 0.1, 16)


def test_dropout_is_no_property_of_weights(tuned, tmp_path):
    tuned(steps=1, dropout=0.0)
    assert RunRecord.read(tmp_path / "tuned").options["dropout"] == 0.0


def test_another_tokenizer_is_refused_with_both_sides(tuned, tmp_path):
    with pytest.raises(
        UserError, match=r"\(259 entries, .*…\) and .*other \(259 entries, .*…\) have different tokenizers"
    ):
        tuned(shards=retokenized(tmp_path / "other"))


@pytest.mark.parametrize("there", [None, "folder"])
def test_no_weights(tuned, tmp_path, there):
    if there:
        (tmp_path / "nothing").mkdir()
    with pytest.raises(UserError, match="nothing: no (such folder|weights there); pass the folder of a run"):
        tuned(from_weight=str(tmp_path / "nothing"))


def test_a_run_without_a_checkpoint_has_no_weights(begin, tuned, tmp_path, whole_run):
    empty = shutil.copytree(whole_run, tmp_path / "empty")
    shutil.rmtree(empty / checkpoint.CHECKPOINTS_NAME)
    with pytest.raises(UserError, match="no checkpoint yet"):
        tuned(from_weight=str(empty))


def test_the_weights_are_not_needed_at_a_resume(tuned, tmp_path, whole_run):
    base = shutil.copytree(whole_run, tmp_path / "base")
    tuned("whole", from_weight=str(base))
    tuned("again", from_weight=str(base))
    shutil.rmtree(base)
    again = tmp_path / "again"
    stop_after(again, 6)
    resume(again, {}, say=Said())
    assert weights(again, 12) == weights(tmp_path / "whole", 12)
    assert metrics(again) == metrics(tmp_path / "whole")


def test_before_its_first_checkpoint_a_run_needs_them_again(tuned, tmp_path, whole_run):
    base = shutil.copytree(whole_run, tmp_path / "base")
    tuned(from_weight=str(base))
    run, end = tmp_path / "tuned", weights(tmp_path / "tuned", 12)
    stop_after(run, 0)
    moved = base.rename(tmp_path / "moved")
    with pytest.raises(UserError, match=r"no checkpoint yet, so it needs .* gone \(.*base: no such folder"):
        resume(run, {}, say=Said())
    with pytest.raises(UserError, match=r"holds others \(in the run: .*…, there: .*…\)"):
        resume(run, {"from_weight": str(moved), "from_step": 9}, say=Said())
    resume(run, {"from_weight": str(moved)}, say=Said())
    assert weights(run, 12) == end
    assert RunRecord.read(run).options["from_weight"] == str(moved)
    assert RunRecord.read(run).changes == ()


def test_what_a_run_began_from_cannot_be_changed():
    assert not changeable(PretrainOptions) & {"from_weight", "from_step", "from_sha256"}


def test_a_run_begun_from_nothing_has_no_origin(whole_run, tmp_path):
    assert RunRecord.read(whole_run).options["from_weight"] is None
    run = shutil.copytree(whole_run, tmp_path / "run")
    stop_after(run, 9)
    with pytest.raises(UserError, match="began from no weights"):
        resume(run, {"from_weight": str(whole_run)}, say=Said())


def test_weights_have_one_checksum_in_whatever_order():
    tensors = {"a": torch.ones(2, 3), "b": torch.zeros(0), "c": torch.tensor(1.5)}
    checksum = checksum_of_tensors(tensors)
    assert checksum_of_tensors(dict(reversed(tensors.items()))) == checksum
    others = ({"a": torch.ones(3, 2)}, {"a": torch.ones(2, 3, dtype=torch.int32)}, {"c": torch.tensor(1.25)})
    assert all(checksum_of_tensors(tensors | other) != checksum for other in others)
    assert checksum_of_tensors({**tensors, "a": torch.ones(3, 2).t()}) == checksum


def test_loaded_weights_say_what_they_are(whole_run):
    found = load_weights(whole_run, step=9)
    config, tensors, tokenizer = found[:3]
    assert (found.step, config.hidden_size, tokenizer) == (9, 16, RunRecord.read(whole_run).tokenizer)
    assert checksum_of_tensors(tensors) == checksum_of_tensors(stored(whole_run, 9))


def test_a_dataset_of_another_kind_is_refused_by_name(tmp_path):
    shards = chat_dataset(tmp_path / "chats", "sft")
    with pytest.raises(UserError, match=r"data: a dataset of kind sft, and `mm-train pretrain` learns kind"):
        entry.begin(config_of(tmp_path / "run", shards), Said())
