"""Validation: the right numbers, on the same windows every time, and no trace of it in what is learned."""

import hashlib
import math

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer as Reference
from tokenizers import decoders, models, pre_tokenizers
from torch import nn
from torch.nn import functional

from minimind_data.dataset.format import IGNORED, TOKENIZER_NAME, TokenizerInfo
from minimind_data.dataset.shard_set import ShardSet
from minimind_data.errors import UserError
from minimind_data.tokenizer.loading import cached_tokenizer
from minimind_data.windows.opening import open_windows
from minimind_train.objectives.objective import MicroLoss, NextToken
from minimind_train.run import entry
from minimind_train.run.entry import resume
from minimind_train.run.evaluation import evaluate
from minimind_train.run_folder.record import RunRecord
from minimind_train.training.evaluate import Evaluator, _byte_counter, open_evaluator
from minimind_train.training.learner import Compute
from minimind_train.weights.loading import model_of
from tests.helpers.datasets import retokenized
from tests.helpers.runs import Said, config_of, metrics, steps, stop_after, weights

COMPUTE = Compute(device=torch.device("cpu"), dtype="fp32")


class Saying(NextToken):
    """Says one loss of whatever comes, which it shows first."""

    def __init__(self, model, show, loss):
        super().__init__(model)
        self.show, self.loss = show, loss

    def forward(self, batch):
        self.show(batch)
        return MicroLoss(torch.tensor(self.loss))


def evaluator_of(folder, *, num_windows=None, batch=8, layout="concat", seq_len=16):
    return open_evaluator(
        ShardSet.open(folder),
        num_windows=num_windows,
        batch_size=batch,
        compute=COMPUTE,
        say=Said(),
        layout=layout,
        seq_len=seq_len,
    )


@pytest.fixture(scope="module")
def model(whole_run):
    return model_of(whole_run, step=9, say=Said())


def plainly(model, windows):
    """(loss, targets, bytes of text) of all windows, the plain way."""
    batch = windows.fetch(np.arange(len(windows)))
    targets = torch.from_numpy(batch["targets"])
    with torch.no_grad():
        logits = model.logits(model(torch.from_numpy(batch["input_ids"]))).double()
    loss = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
    learned = targets[targets != IGNORED].tolist()
    # The test's tokens are single bytes, and its first three are special.
    return float(loss), len(learned), sum(token > 2 for token in learned)


@pytest.mark.parametrize("layout", ["concat", "pad"])
def test_the_numbers_are_those_of_the_plain_way(model, other_dataset, layout):
    shards = ShardSet.open(other_dataset)
    windows = open_windows(shards, layout=layout, seq_len=16)
    loss, targets, num_bytes = plainly(model, windows)
    for batch in (1, 7, 1000):
        found = evaluator_of(other_dataset, batch=batch, layout=layout).measure(NextToken(model))
        assert found.loss == pytest.approx(loss, rel=1e-5)
        assert found.perplexity == pytest.approx(math.exp(loss), rel=1e-4)
        assert (found.targets, found.bytes) == (targets, num_bytes)
        assert found.bits_per_byte == pytest.approx(loss * targets / num_bytes / math.log(2), rel=1e-5)


def test_bytes_of_whole_documents_are_those_of_their_text(other_dataset):
    shards = ShardSet.open(other_dataset)
    tokenizer = cached_tokenizer((other_dataset / TOKENIZER_NAME).read_text(), shards.manifest.tokenizer)
    texts = [tokenizer.reference.decode(shard.tokens.tolist(), skip_special_tokens=True) for shard in shards]
    evaluator = evaluator_of(other_dataset, layout="pad", seq_len=100)
    silent = Saying(nn.Linear(1, 1), lambda _: None, 0.0)
    assert evaluator.measure(silent).bytes == sum(len(t.encode()) for t in texts)


def test_some_windows_are_spread_evenly_and_the_same_every_time(model, other_dataset):
    windows = open_windows(ShardSet.open(other_dataset), layout="concat", seq_len=16)
    seen = []

    def recording(batch):
        seen.extend(row.tobytes() for row in batch["input_ids"].numpy())

    objective = Saying(model, recording, 0.0)
    evaluator = evaluator_of(other_dataset, num_windows=10, batch=4)
    reported = []
    first = evaluator.measure(objective, report=reported.append)
    assert (reported, evaluator.num_windows) == ([4, 4, 2], 10)
    n = len(windows)
    wanted = windows.fetch(np.array([i * n // 10 for i in range(10)]))["input_ids"]
    assert seen == [row.tobytes() for row in wanted]
    assert evaluator.measure(objective) == first
    assert seen == 2 * [row.tobytes() for row in wanted]
    seen.clear()
    evaluator_of(other_dataset, num_windows=10**9).measure(objective)
    assert len(seen) == n


def test_a_vocabulary_that_is_not_of_bytes_is_counted_by_decoding(tmp_path):
    words = ["[PAD]", "[BOS]", "[EOS]", "▁the", "▁cat", "s", "▁北京", "▁sat"]
    reference = Reference(models.WordLevel({word: n for n, word in enumerate(words)}, unk_token="[PAD]"))
    reference.pre_tokenizer = pre_tokenizers.Metaspace()
    reference.decoder = decoders.Metaspace()
    reference.add_special_tokens(words[:3])
    text = reference.to_str()
    info = TokenizerInfo(
        sha256=hashlib.sha256(text.encode()).hexdigest(), vocab_size=8, bos_id=1, eos_id=2, pad_id=0
    )
    count = _byte_counter(cached_tokenizer(text, info))
    # the cats 北京 | sat: a window that begins inside of the text counts its first space too
    batch = {
        "input_ids": np.array([[1, 3, 4, 5, 6, 2], [6, 7, 2, 0, 0, 0], [1, 2, 0, 0, 0, 0]]),
        "targets": np.array([[3, 4, 5, 6, 2, IGNORED], [7, 2] + 4 * [IGNORED], 6 * [IGNORED]]),
    }
    assert count(batch) == len("the cats 北京".encode()) + len(" sat")


def test_a_model_stays_in_its_mode_and_a_random_generator_where_it_is(model, other_dataset):
    evaluator = evaluator_of(other_dataset)
    for training in (True, False):
        model.train(training)
        state = torch.get_rng_state()
        modes = []

        class Noting(NextToken):
            def forward(self, batch, modes=modes):
                modes.append((self.model.training, torch.is_grad_enabled()))
                return super().forward(batch)

        objective = Noting(model)
        objective.train(training)
        evaluator.measure(objective)
        assert set(modes) == {(False, False)}
        assert model.training is training
        assert torch.equal(torch.get_rng_state(), state)
    model.eval()


def test_a_loss_that_is_no_number_is_said(model, other_dataset):
    with pytest.raises(UserError, match="the model's loss on it is nan"):
        evaluator_of(other_dataset).measure(Saying(model, lambda _: None, math.nan))


def test_a_dataset_without_text_is_refused(other_dataset):
    shards = ShardSet.open(other_dataset)
    windows = open_windows(shards, layout="concat", seq_len=16)
    windows.fetch = lambda numbers: {  # BOS and EOS alone
        name: np.full((len(numbers), 16), 2) for name in ("input_ids", "targets")
    }
    tokenizer = cached_tokenizer((other_dataset / TOKENIZER_NAME).read_text(), shards.manifest.tokenizer)
    with pytest.raises(UserError, match="windows for validation hold no text"):
        Evaluator(windows, tokenizer, num_windows=3, batch_size=2, compute=COMPUTE)


# In a run


@pytest.fixture
def measured_run(tmp_path, small_dataset, other_dataset):
    run = tmp_path / "run"
    said = Said()
    options = {"val_shards": str(other_dataset), "val_every": 5, "val_batches": 2, "log_every": 4}
    entry.begin(config_of(run, small_dataset, keep=0, dropout=0.1, **options), said)
    return run, said


def test_a_run_that_is_measured_learns_the_same_bit_for_bit(measured_run, whole_run):
    run, said = measured_run
    for step in (3, 6, 9, 12):
        assert weights(run, step) == weights(whole_run, step)
    assert steps(run) == [1, 4, 5, 8, 10, 12]
    whole = {record["step"]: record for record in metrics(whole_run)}
    for record in metrics(run):
        measured = {name: value for name, value in record.items() if name.startswith("val_")}
        assert set(measured) == (
            {"val_loss", "val_perplexity", "val_bits_per_byte", "val_targets", "val_bytes"}
            if record["step"] in {5, 10, 12}
            else set()
        )
        assert record == whole[record["step"]] | measured
    last = metrics(run)[-1]
    assert last["val_targets"] == 2 * 8 * 16
    assert f"step 12/12  validation loss {last['val_loss']:.4f}" in said.text


def test_a_stopped_run_is_measured_as_the_whole_one(measured_run):
    run, _ = measured_run
    there = metrics(run)
    for stop in (9, 3):
        stop_after(run, stop)
        resume(run, {}, say=Said())
        assert metrics(run) == there


def test_what_a_run_is_measured_on_may_change(measured_run, other_dataset, whole_run):
    run, _ = measured_run
    stop_after(run, 6)
    resume(run, {"val_every": 4, "val_batches": 0}, say=Said())
    assert [record["step"] for record in metrics(run) if "val_loss" in record] == [5, 8, 12]
    assert RunRecord.read(run).changes == ()
    assert RunRecord.read(run).options["val_every"] == 4
    assert weights(run, 12) == weights(whole_run, 12)
    stop_after(run, 6)
    resume(run, {"val_shards": ""}, say=Said())
    assert [record["step"] for record in metrics(run) if "val_loss" in record] == [5]


def test_what_cannot_be_measured_on_is_refused_before_a_run_begins(tmp_path, small_dataset):
    other = retokenized(tmp_path / "other")
    for words, complaint in (
        (str(tmp_path / "nothing"), "no dataset"),
        (str(other), "have different tokenizers"),
    ):
        with pytest.raises(UserError, match=complaint):
            entry.begin(config_of(tmp_path / "run", small_dataset, val_shards=words), Said())
        assert not (tmp_path / "run").exists()


def test_to_be_measured_on_what_is_learned_is_said(tmp_path, small_dataset):
    said = Said()
    entry.begin(config_of(tmp_path / "run", small_dataset, steps=1, val_shards=str(small_dataset)), said)
    assert "what `val_shards` measures is memory" in said.text


@pytest.mark.parametrize("changes", [{"val_every": 0}, {"val_batches": -1}])
def test_wrong_options_are_refused(tmp_path, small_dataset, changes):
    with pytest.raises(ValueError, match="must be from"):
        config_of(tmp_path / "run", small_dataset, **changes)


# From outside


def test_a_run_measured_from_outside_gives_what_it_gave_itself(measured_run, other_dataset):
    run, _ = measured_run
    found = evaluate(run, other_dataset, windows=16, device="cpu", say=Said())
    last = metrics(run)[-1]
    assert found.loss == pytest.approx(last["val_loss"], rel=1e-6)
    assert (found.targets, found.bytes) == (last["val_targets"], last["val_bytes"])
    earlier = evaluate(run, other_dataset, checkpoint=3, device="cpu", say=Said())
    assert earlier.loss != found.loss


def test_the_precision_is_the_run_s_unless_another_is_asked_for(measured_run, other_dataset):
    run, _ = measured_run

    def loss(**asked):
        return evaluate(run, other_dataset, windows=16, device="cpu", say=Said(), **asked).loss

    assert loss() == loss(dtype="fp32")
    assert loss(dtype="bf16") != loss()
    assert loss(dtype="bf16") == pytest.approx(loss(), rel=1e-2)


def test_a_run_is_not_measured_on_another_tokenizer(tmp_path, whole_run, small_dataset):
    other = retokenized(tmp_path / "other")
    with pytest.raises(
        UserError, match=r"\(259 entries, .*, \w{12}…\) and .* \(259 entries, .* have different tokenizers"
    ):
        evaluate(whole_run, other, say=Said())
