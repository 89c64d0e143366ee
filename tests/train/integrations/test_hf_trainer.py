"""OrderedTrainer: the real Trainer, on a real model, learns what the order says, however a run is cut up and divided."""

import importlib
import json
import shutil
import sys

import numpy as np
import pytest
import torch

from minimind_data.dataset.shard_set import ShardSet
from minimind_data.errors import UserError
from minimind_data.windows.opening import open_windows
from minimind_train.batches.datasets import Datasets
from minimind_train.batches.torch_loader import WindowDataset
from minimind_train.order.sample_order import SampleOrder
from minimind_train.order.skips import Skips
from tests.helpers.runs import Said

transformers = pytest.importorskip("transformers")
hf_trainer = pytest.importorskip("minimind_train.integrations.hf_trainer")

SEQ_LEN = 16


@pytest.fixture(scope="module")
def windows(small_dataset):
    return open_windows(ShardSet.open(small_dataset), layout="concat", seq_len=SEQ_LEN, labels=True)


def make_model(vocab_size=259, seed=0):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        attention_dropout=0.1,  # so that random states matter
    )
    return transformers.LlamaForCausalLM(config)


class Recorder:
    """A dataset that remembers which windows were asked for."""

    def __init__(self, windows):
        self.inner, self.seen = WindowDataset(windows), []

    def __len__(self):
        return len(self.inner)

    def __getitems__(self, numbers):
        self.seen += numbers
        return self.inner.__getitems__(numbers)


def make_trainer(folder, windows, *, order=None, skips=None, dataset=None, eval_dataset=None, **changes):
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_steps": 12,
        "save_steps": 3,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
    }
    return hf_trainer.OrderedTrainer(
        model=make_model(),
        args=transformers.TrainingArguments(**settings | changes),
        train_dataset=dataset or WindowDataset(windows),
        eval_dataset=eval_dataset,
        order=order or SampleOrder(num_windows=len(windows), seed=5),
        **({"skips": skips} if skips else {}),
    )


def losses(trainer):
    return {line["step"]: line["loss"] for line in trainer.state.log_history if "loss" in line}


def weights(trainer):
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def place(folder, step):
    told = json.loads((folder / f"checkpoint-{step}" / "trainer_state.json").read_text())
    return told["stateful_callbacks"]["PlaceCallback"]["attributes"]["place"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, windows):
    """A run that was never stopped: its folder and its trainer."""
    folder = tmp_path_factory.mktemp("whole")
    torch.set_num_threads(1)
    trainer = make_trainer(folder, windows)
    trainer.train()
    return folder, trainer


def resumed(tmp_path, whole, step, windows, **changes):
    """A trainer in a folder that has what a run had after a step."""
    shutil.copytree(whole[0] / f"checkpoint-{step}", tmp_path / f"checkpoint-{step}")
    return make_trainer(tmp_path, windows, **changes)


def test_it_learns_the_order_across_epochs_and_saves_its_position(tmp_path, windows):
    dataset, order = Recorder(windows), SampleOrder(num_windows=len(windows), seed=5)
    steps = 2 * len(windows) // 8 + 3
    trainer = make_trainer(tmp_path, windows, dataset=dataset, order=order, max_steps=steps, save_steps=steps)
    trainer.train()
    assert dataset.seen == order.windows(np.arange(steps * 8)).tolist()
    assert place(tmp_path, steps) == {"position": steps * 8, **order.described(steps * 8)}
    assert trainer.state.epoch == pytest.approx(steps * 8 / len(windows))
    assert [line["epoch"] for line in trainer.state.log_history if "loss" in line] == pytest.approx(
        [step * 8 / len(windows) for step in range(1, steps + 1)], abs=1e-3
    )


@pytest.mark.parametrize("step", [3, 9])
def test_resumed_it_ends_like_the_uninterrupted_run_bit_for_bit(tmp_path, windows, whole, step):
    dataset = Recorder(windows)
    trainer = resumed(tmp_path, whole, step, windows, dataset=dataset)
    trainer.train(resume_from_checkpoint=True)
    order = SampleOrder(num_windows=len(windows), seed=5)
    assert dataset.seen == order.windows(np.arange(step * 8, 96)).tolist()  # nothing before it was read
    assert losses(trainer) == losses(whole[1])
    there, here = weights(whole[1]), weights(trainer)
    assert all(torch.equal(there[name], here[name]) for name in there)


@pytest.mark.parametrize(("micro_batch", "accumulation"), [(8, 1), (2, 4), (1, 8)])
def test_another_division_of_the_batch_learns_the_same(tmp_path, windows, whole, micro_batch, accumulation):
    divided = {"per_device_train_batch_size": micro_batch, "gradient_accumulation_steps": accumulation}
    dataset = Recorder(windows)
    trainer = resumed(tmp_path, whole, 6, windows, dataset=dataset, **divided)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    order = SampleOrder(num_windows=len(windows), seed=5)
    assert dataset.seen == order.windows(np.arange(48, 96)).tolist()
    assert place(tmp_path, 12)["position"] == 96


def test_another_global_batch_goes_on_at_the_same_sample(tmp_path, windows, whole):
    dataset, order = Recorder(windows), SampleOrder(num_windows=len(windows), seed=5)
    trainer = resumed(tmp_path, whole, 6, windows, dataset=dataset, gradient_accumulation_steps=1)
    trainer.train(resume_from_checkpoint=True)
    assert dataset.seen == order.windows(np.arange(48, 48 + 6 * 4)).tolist()
    assert trainer.state.global_step == 12
    again = Recorder(windows)
    trainer = make_trainer(tmp_path, windows, dataset=again, gradient_accumulation_steps=3, max_steps=14)
    trainer.train(resume_from_checkpoint=True)
    assert again.seen == order.windows(np.arange(72, 72 + 2 * 12)).tolist()


def test_every_rank_has_its_share(windows, tmp_path):
    order = SampleOrder(num_windows=len(windows), seed=5)
    for world_size in (1, 2, 3, 4, 8):
        ranks = [
            list(
                hf_trainer._StepSampler(
                    order, 24 // 2, accumulation=2, first_step=0, rank=rank, world_size=world_size, stop=120
                )
            )
            for rank in range(world_size)
        ]
        for number, shares in enumerate(zip(*ranks, strict=True)):
            expected = order.windows(np.arange(12 * number, 12 * number + 12)).tolist()
            assert list(shares) == [expected[rank::world_size] for rank in range(world_size)]


def test_epochs_end_with_whole_steps_and_what_is_due_at_their_ends_is_done(tmp_path, windows):
    dataset, n = Recorder(windows), len(windows)
    steps = -(-2 * n // 8)
    by_epoch = {"save_strategy": "epoch", "eval_strategy": "epoch", "logging_strategy": "epoch"}
    trainer = make_trainer(
        tmp_path,
        windows,
        dataset=dataset,
        eval_dataset=WindowDataset(windows),
        max_steps=-1,
        num_train_epochs=2,
        **by_epoch,
    )
    trainer.train()
    assert trainer.state.global_step == steps
    assert len(dataset.seen) == steps * 8
    assert sorted(dataset.seen[: 2 * n]) == sorted([*range(n)] * 2)
    ends = [-(-n // 8), steps]
    assert sorted(int(path.name.partition("-")[2]) for path in tmp_path.glob("checkpoint-*")) == ends
    assert [line["step"] for line in trainer.state.log_history if "eval_loss" in line] == ends


def test_epochs_after_a_change_of_the_batch_end_at_the_same_sample(tmp_path, windows):
    first = make_trainer(tmp_path, windows, max_steps=-1, num_train_epochs=1, save_steps=2)
    first.train()
    for later in (path for path in tmp_path.glob("checkpoint-*") if path.name != "checkpoint-2"):
        shutil.rmtree(later)
    dataset = Recorder(windows)
    trainer = make_trainer(
        tmp_path, windows, dataset=dataset, max_steps=-1, num_train_epochs=1, per_device_train_batch_size=5
    )
    trainer.train(resume_from_checkpoint=True)
    left = -(-(len(windows) - 16) // 10)
    assert trainer.state.global_step == 2 + left
    assert len(dataset.seen) == left * 10


def test_a_finished_run_has_nothing_to_do(tmp_path, windows, whole):
    dataset = Recorder(windows)
    trainer = resumed(tmp_path, whole, 12, windows, dataset=dataset)
    trainer.train(resume_from_checkpoint=True)
    assert dataset.seen == []
    assert trainer.state.global_step == 12


def test_positions_are_left_out(tmp_path, windows):
    dataset, order = Recorder(windows), SampleOrder(num_windows=len(windows), seed=5)
    trainer = make_trainer(
        tmp_path, windows, dataset=dataset, order=order, skips=Skips.of(["5:21"]), max_steps=3
    )
    trainer.train()
    kept = [position for position in range(40) if not 5 <= position < 21]
    assert dataset.seen == order.windows(np.array(kept)).tolist()
    assert place(tmp_path, 3)["position"] == 40


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_workers_that_read_ahead_move_no_place(tmp_path, windows, whole):
    trainer = make_trainer(tmp_path, windows, dataloader_num_workers=2)
    trainer.train()
    assert [place(tmp_path, step)["position"] for step in (3, 6, 9, 12)] == [24, 48, 72, 96]
    assert losses(trainer) == losses(whole[1])


def test_restoring_callbacks_as_trainer_offers_it_changes_nothing(tmp_path, windows, whole):
    trainer = resumed(tmp_path, whole, 6, windows, restore_callback_states_from_checkpoint=True)
    trainer.train(resume_from_checkpoint=True)
    assert losses(trainer) == losses(whole[1])
    assert place(tmp_path, 12)["position"] == 96


def test_a_resume_at_a_billion_reads_nothing_before_it(tmp_path, windows, whole):
    """The checkpoint says a place that no walk would reach in the time of this test."""
    shutil.copytree(whole[0] / "checkpoint-6", tmp_path / "checkpoint-6")
    path = tmp_path / "checkpoint-6" / "trainer_state.json"
    told = json.loads(path.read_text())
    told["global_step"] = 10**9 // 8
    told["stateful_callbacks"]["PlaceCallback"]["attributes"]["place"]["position"] = 10**9
    path.write_text(json.dumps(told))
    dataset, order = Recorder(windows), SampleOrder(num_windows=len(windows), seed=5)
    trainer = make_trainer(tmp_path, windows, dataset=dataset, max_steps=10**9 // 8 + 2)
    trainer.train(resume_from_checkpoint=True)
    assert dataset.seen == order.windows(np.arange(10**9, 10**9 + 16)).tolist()


def test_a_mixture_is_an_order_too(tmp_path, small_dataset, other_dataset):
    datasets = Datasets.open([f"a={small_dataset}:3", f"b={other_dataset}:1"])
    mixed = datasets.windows(say=Said(), layout="concat", seq_len=SEQ_LEN, labels=True)
    order = datasets.order(mixed, seed=5, kind="shuffled")
    dataset = Recorder(mixed)
    make_trainer(tmp_path, mixed, dataset=dataset, order=order, max_steps=6).train()
    again = Recorder(mixed)
    shutil.rmtree(tmp_path / "checkpoint-6")
    make_trainer(tmp_path, mixed, dataset=again, order=order, max_steps=6).train(resume_from_checkpoint=True)
    assert dataset.seen == order.windows(np.arange(48)).tolist()
    assert again.seen == dataset.seen[24:]


def test_what_does_not_fit_is_refused(tmp_path, windows, whole):
    other = resumed(tmp_path, whole, 6, windows, order=SampleOrder(num_windows=len(windows), seed=6))
    with pytest.raises(UserError, match="seed is 5 in the saved state, 6 here"):
        other.train(resume_from_checkpoint=True)
    path = tmp_path / "checkpoint-6" / "trainer_state.json"
    told = json.loads(path.read_text())
    del told["stateful_callbacks"]["PlaceCallback"]
    path.write_text(json.dumps(told))
    with pytest.raises(UserError, match="resume a checkpoint that OrderedTrainer saved"):
        make_trainer(tmp_path, windows).train(resume_from_checkpoint=True)
    with pytest.raises(UserError, match=f"the order has 7 windows, train_dataset has {len(windows)}"):
        make_trainer(tmp_path, windows, order=SampleOrder(num_windows=7))
    with pytest.raises(UserError, match="auto_find_batch_size"):
        make_trainer(tmp_path, windows, auto_find_batch_size=True)


@pytest.mark.parametrize("family", ["Llama", "Qwen3"])
def test_documents_in_a_packed_window_are_kept_apart_by_their_positions(small_dataset, family):
    """`position_ids` are all that the models of transformers need where they keep no cache, as in training: each document has the
    logits that it has alone."""
    windows = open_windows(
        ShardSet.open(small_dataset), layout="pack", seq_len=64, labels=True, documents_apart=True
    )
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=259,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    sample = windows.fetch(np.array([1]))
    ids = windows.document_ids(1)
    inputs, positions = torch.from_numpy(sample["input_ids"]), torch.from_numpy(sample["position_ids"])
    documents = sorted(set(ids.tolist()) - {-1})
    assert len(documents) > 1
    with torch.no_grad():
        together = model(inputs, position_ids=positions, use_cache=False).logits[0]
        for document in documents:
            here = ids == document
            alone = model(inputs[:, here]).logits[0]
            torch.testing.assert_close(together[here], alone, atol=1e-5, rtol=1e-4)


def test_without_transformers_its_import_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "minimind_train.integrations.hf_trainer")
    with pytest.raises(
        ModuleNotFoundError, match=r"needs transformers.*pip install 'minimind-pipeline\[hf\]'"
    ):
        importlib.import_module("minimind_train.integrations.hf_trainer")
