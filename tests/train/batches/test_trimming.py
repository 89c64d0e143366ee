"""What is cut off a micro-batch changes neither loss nor gradients, and everything that is learned stays."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from minimind_data.dataset.format import IGNORED
from minimind_data.errors import UserError
from minimind_data.options import options_from
from minimind_train.batches.steps import StepLoader
from minimind_train.batches.trimming import COLUMNS, batches_of_like_lengths, lengths_of, trimmed
from minimind_train.model.config import ModelConfig
from minimind_train.model.transformer import MiniMind, initialize
from minimind_train.objectives.objective import NextToken
from minimind_train.objectives.options import PreferenceOptions
from minimind_train.objectives.preference import REFERENCE, Preference
from minimind_train.order.sample_order import SampleOrder
from minimind_train.run import entry
from minimind_train.run import rank as rank_job
from minimind_train.run.options import DpoOptions
from minimind_train.training.evaluate import Evaluator
from minimind_train.training.learner import Compute
from minimind_train.training.nonfinite import NonfiniteGuard
from minimind_train.training.options import OptimizerOptions
from minimind_train.training.step import NotFiniteError, take_step
from tests.helpers.loops import learner_of, step_loader
from tests.helpers.runs import Said, config_of, metrics

LENGTH, NUM_WINDOWS, VOCAB = 3 * COLUMNS + 5, 13, 40
CPU = torch.device("cpu")


class Uneven:
    """Windows of uneven lengths behind which there is PAD; the first token of each is its number."""

    layout, seq_len, labels = "pad", LENGTH, False
    shard_sets = ()
    shards = SimpleNamespace(folder="data", manifest=SimpleNamespace(fingerprint="f" * 64))

    def __init__(self, form):
        self.form = form

    def __len__(self):
        return NUM_WINDOWS

    def will_need(self, windows):
        pass

    def fetch(self, windows):
        if self.form == "pairs":
            sides = {"chosen": self._rows(windows, 0), "rejected": self._rows(windows, 1)}
            batch = {f"{side}_{name}": array for side, rows in sides.items() for name, array in rows.items()}
            return {**batch, REFERENCE: np.stack([-windows - 200.0, windows - 210.0], 1).astype(np.float32)}
        batch = self._rows(windows, 0)
        if self.form == "documents":
            batch["position_ids"] = np.tile(np.arange(LENGTH) % (COLUMNS - 3), (len(windows), 1))
        return batch

    @staticmethod
    def _rows(windows, side):
        ids = np.zeros((len(windows), LENGTH + 1), np.int64)
        for row, number in zip(ids, windows.tolist(), strict=True):
            # Some short, one as long as can be, one with nothing to learn.
            draw = np.random.default_rng([number, side])
            size = {3: LENGTH + 1, 7: 1}.get(number, int(draw.integers(2, LENGTH)))
            row[:size] = draw.integers(14, VOCAB, size)
            row[0] = number + 1
        targets = ids[:, 1:].copy()
        targets[targets == 0] = IGNORED
        return {"input_ids": ids[:, :-1].copy(), "targets": targets}


def steps(form, *, trim, micro_batch, **options):
    order = SampleOrder(num_windows=NUM_WINDOWS, seed=2)
    objective = Preference if form == "pairs" else NextToken
    with step_loader(
        Uneven(form),
        order,
        start=0,
        stop=NUM_WINDOWS,
        global_batch=NUM_WINDOWS,
        micro_batch=micro_batch,
        num_terms=objective.num_terms,
        trim=trim,
        **options,
    ) as loader:
        return list(loader), loader


def make_model(**changes):
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = MiniMind(ModelConfig(**{**shape, "vocab_size": VOCAB, **changes}))
    initialize(model, 3)
    return model


def objective_for(form, model):
    if form == "pairs":
        return Preference(model, PreferenceOptions(), lambda micro_batch: micro_batch[REFERENCE])
    return NextToken(model)


def learned(form, **options):
    """What a step gives, and the gradients that it moves the weights by."""
    (batch,), _ = steps(form, **options)
    model = make_model()
    result = take_step(
        learner_of(objective_for(form, model), OptimizerOptions(grad_clip=0.0)), batch, rate=0.0
    )
    return result, {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("form", ["text", "documents", "pairs"])
@pytest.mark.parametrize("micro_batch", [3, 100])
def test_a_step_has_the_same_loss_and_gradients(form, micro_batch):
    whole, expected = learned(form, trim=False, micro_batch=100)
    result, gradients = learned(form, trim=True, micro_batch=micro_batch)
    assert result.loss == pytest.approx(whole.loss, rel=1e-6)
    assert result.metrics == pytest.approx(whole.metrics, rel=1e-5)
    assert result.num_targets == whole.num_targets
    if micro_batch == 3:
        assert result.num_tokens < 0.9 * whole.num_tokens
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("form", ["text", "documents", "pairs"])
@pytest.mark.parametrize("size", [1, 4, 13, 50])
def test_every_row_comes_once_with_all_that_it_learns(form, size):
    samples = Uneven(form).fetch(np.arange(NUM_WINDOWS))
    lengths, seen, widths = lengths_of(samples), [], []
    for rows, batch in batches_of_like_lengths(samples, size):
        assert 1 <= len(rows) <= size
        seen += rows.tolist()
        for name, array in batch.items():
            kept = array.shape[1] if name != REFERENCE else 2
            assert np.array_equal(array, samples[name][rows, :kept])
            assert array.flags.c_contiguous
            if name.endswith("targets"):
                assert (samples[name][rows, kept:] == IGNORED).all()
                assert kept == LENGTH or kept % COLUMNS == 0
                assert kept - COLUMNS < max(1, lengths[rows].max()), "no more than it takes"
                widths.append(kept)
    assert sorted(seen) == list(range(NUM_WINDOWS))
    assert widths == sorted(widths, reverse=True)


def test_rows_of_one_length_stay_in_order_and_are_not_copied():
    samples = {name: array[[3] * 6] for name, array in Uneven("text").fetch(np.arange(NUM_WINDOWS)).items()}
    for rows, batch in batches_of_like_lengths(samples, 4):
        assert rows.tolist() in ([0, 1, 2, 3], [4, 5])
        assert np.shares_memory(batch["input_ids"], samples["input_ids"])


def of_lengths(lengths):
    """Samples of which each learns so many columns; the first token of each is its row."""
    columns = np.arange(4 * COLUMNS)
    targets = np.where(columns < np.array(lengths)[:, None], columns + 1, IGNORED)
    return {"input_ids": np.tile(np.arange(len(lengths))[:, None], len(columns)), "targets": targets}


@pytest.mark.parametrize(
    ("lengths", "batches"),
    [
        # Of as many steps of columns, each the last of a step or the first of the next.
        ([COLUMNS + 1, 2 * COLUMNS, COLUMNS + 5, 2 * COLUMNS], [([0, 1], 2), ([2, 3], 2)]),
        ([2 * COLUMNS, 2 * COLUMNS + 1, 2 * COLUMNS, 5], [([1, 0], 3), ([2, 3], 2)]),
        ([COLUMNS, 1, COLUMNS - 1, 40], [([3, 0], 2), ([1, 2], 1)]),
        ([0, 0, 0], [([0, 1], 1), ([2], 1)]),
        ([0, 1, 0], [([1, 0], 1), ([2], 1)]),
        ([3 * COLUMNS], [([0], 3)]),
        ([COLUMNS, 3 * COLUMNS], [([0, 1], 3)]),  # one batch has nothing to put in order
    ],
)
def test_rows_are_put_in_order_by_whole_steps_of_columns_alone(lengths, batches):
    samples = of_lengths(lengths)
    assert lengths_of(samples).tolist() == lengths
    found = [(rows.tolist(), batch) for rows, batch in batches_of_like_lengths(samples, 2)]
    assert [(rows, batch["targets"].shape[1] // COLUMNS) for rows, batch in found] == batches
    assert all(batch["input_ids"][:, 0].tolist() == rows for rows, batch in found)


def test_a_batch_with_nothing_to_learn_keeps_something():
    batch = trimmed(Uneven("text").fetch(np.array([7, 7])))
    assert batch["input_ids"].shape == (2, COLUMNS)


def test_what_has_no_columns_of_tokens_stays_whole():
    samples = Uneven("text").fetch(np.array([0, 7])) | {"scores": np.zeros((2, 3 * LENGTH))}
    batch = trimmed(samples, 1)
    assert {name: array.shape[1] for name, array in batch.items()} == {
        "input_ids": COLUMNS,
        "targets": COLUMNS,
        "scores": 3 * LENGTH,
    }


@pytest.mark.parametrize("world_size", [2, 5])
def test_ranks_cut_their_own_share_and_padding_batches_too(world_size):
    whole, _ = steps("text", trim=True, micro_batch=100)
    seen, num_targets = [], 0
    for rank in range(world_size):
        (step,), _ = steps("text", trim=True, micro_batch=2, rank=rank, world_size=world_size)
        own = [token for batch in step.micro_batches for token in batch["input_ids"][:, 0].tolist()]
        seen += [(rank + int(row) * world_size, token) for row, token in zip(step.rows, own, strict=True)]
        num_targets += sum(int((batch["targets"] != IGNORED).sum()) for batch in step.micro_batches)
        assert step.padding_batch is None or step.padding_batch["input_ids"].shape[1] <= LENGTH
    assert [token for _, token in sorted(seen)] == whole[0].micro_batches[0]["input_ids"][:, 0].tolist()
    assert num_targets == whole[0].num_targets


def test_nothing_is_cut_off_unless_asked_for():
    order, options = SampleOrder(num_windows=NUM_WINDOWS), {"start": 0, "stop": 1, "global_batch": 1}
    (step,) = step_loader(Uneven("text"), order, micro_batch=1, **options)
    assert step.micro_batches[0]["input_ids"].shape == (1, LENGTH)
    assert step.rows is None


@pytest.mark.parametrize("trim", [False, True])
@pytest.mark.parametrize("rank", [0, 3])
def test_a_padding_batch_is_the_first_window_of_the_step_cut_where_the_others_are(trim, rank):
    # Of 13 windows the ranks have 3, 3, 3, 2 and 2, so the last two pass once where the others pass twice.
    (step,), loader = steps("text", trim=trim, micro_batch=2, rank=rank, world_size=5)
    if rank == 0:
        assert step.padding_batch is None
        return
    window = loader.windows.fetch(loader.samples.order.windows(np.array([0])))
    expected = trimmed(window) if trim else window
    assert expected["input_ids"].shape == (1, 3 * COLUMNS if trim else LENGTH)
    assert {name: tensor.tolist() for name, tensor in step.padding_batch.items()} == {
        name: array.tolist() for name, array in expected.items()
    }


@pytest.mark.parametrize("form", ["text", "pairs", "experts"])
def test_a_padding_batch_counts_for_nothing(form):
    shape = {"use_moe": True, "num_experts": 4, "router_aux_loss_coef": 0.1} if form == "experts" else {}
    (batch,), loader = steps(form, trim=False, micro_batch=4)
    padding_batch = {
        name: torch.from_numpy(array) for name, array in loader.windows.fetch(np.array([4])).items()
    }
    results, gradients = [], []
    for each in (batch, replace(batch, padding_batch=padding_batch)):
        model = make_model(**shape)
        learner = learner_of(objective_for(form, model), OptimizerOptions(grad_clip=0.0))
        results.append(take_step(learner, each, rate=0.0))
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert results[1] == results[0]
    assert bool(results[0].metrics) == (form == "pairs")
    assert (results[0].auxiliary is not None) == (form == "experts")
    for name, gradient in gradients[1].items():
        torch.testing.assert_close(gradient, gradients[0][name], rtol=0, atol=0, msg=name)


@pytest.mark.parametrize("token", [1, 4, 12])
def test_a_window_that_spoils_a_step_is_named_by_its_own_position(token):
    (batch,), loader = steps("text", trim=True, micro_batch=3)
    model = make_model(tie_word_embeddings=False)
    with torch.no_grad():
        model.model.embed_tokens.weight[token] = float("inf")  # the number of one window, in no other
    guard = NonfiniteGuard(learner_of(NextToken(model)), "stop", run="runs/it", say=Said())
    place = loader.samples.order.windows(np.arange(NUM_WINDOWS)).tolist().index(token - 1)
    with pytest.raises(UserError, match=f"from position {place} of the positions 0 to 12"):
        guard.handle(
            NotFiniteError("the loss is nan"),
            1,
            batch,
            positions=loader.positions(batch),
        )


@pytest.mark.parametrize("form", ["text", "pairs"])
@pytest.mark.parametrize("shape", [{}, {"use_moe": True, "num_experts": 4}])
def test_measuring_reads_no_more_than_it_takes_and_finds_the_same(form, shape, monkeypatch):
    objective, widths = objective_for(form, make_model(**shape)), []
    real = objective.forward
    objective.forward = lambda batch: (widths.append(next(iter(batch.values())).shape[1]), real(batch))[1]

    def measured():
        options = {"num_windows": None, "batch_size": 2, "compute": Compute(device=CPU, dtype="fp32")}
        return Evaluator(Uneven(form), None, **options).measure(objective)

    found = measured()
    assert len(set(widths)) > 1
    monkeypatch.setattr("minimind_train.training.evaluate.trimmed", lambda samples: samples)
    whole = measured()
    assert widths[-1] == LENGTH
    assert found.loss == pytest.approx(whole.loss, rel=1e-6)
    assert found.metrics == pytest.approx(whole.metrics, rel=1e-5)


def spied(monkeypatch, **always):
    """Note how the loaders of runs are made."""
    made = []

    def loader(*given, **options):
        made.append(options["trim"])
        return StepLoader(*given, **{**options, **always})

    monkeypatch.setattr(rank_job, "StepLoader", loader)
    return made


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ({}, True),
        ({"use_moe": True, "num_experts": 2}, False),
        ({"use_moe": True, "num_experts": 2, "router_aux_loss_coef": 0.0}, True),
    ],
)
def test_runs_trim_unless_a_loss_counts_pad(tmp_path, small_dataset, monkeypatch, shape, expected):

    made = spied(monkeypatch)
    entry.begin(config_of(tmp_path / "run", small_dataset, layout="pad", steps=1, **shape), Said())
    assert made == [expected]


def test_a_run_of_pairs_learns_the_same(tmp_path, dpo_dataset, chat_base, monkeypatch):
    options = {
        "shards": (str(dpo_dataset),), "from_weight": str(chat_base), "seq_len": 80, "global_batch": 8, "steps": 4,
        "threads": 1, "log_every": 1, "dtype": "fp32", "device": "cpu", "learning_rate": 1e-3,
    }  # fmt: skip
    found = []
    for name, always, micro_batch in (("trimmed", {}, 3), ("whole", {"trim": False}, 8)):
        spied(monkeypatch, **always)
        config = options_from(DpoOptions, {**options, "run": tmp_path / name, "micro_batch": micro_batch})
        entry.begin(config, Said())
        found.append(metrics(tmp_path / name))
    for one, other in zip(*found, strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-5)
