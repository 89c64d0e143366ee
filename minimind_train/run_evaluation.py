"""A run that is measured from outside: the model of a checkpoint on any dataset of its tokenizer."""

from dataclasses import replace
from pathlib import Path

from minimind_data.errors import UserError
from minimind_data.options import build
from minimind_data.shards import ShardSet
from minimind_train.config import DataConfig, from_options, window_options
from minimind_train.devices import resolve_device
from minimind_train.dpo import DPO, DpoConfig
from minimind_train.evaluate import Evaluation, open_evaluator
from minimind_train.loop import RunConfig
from minimind_train.model import MiniMind
from minimind_train.objective import NextToken, Objective
from minimind_train.parts import words_of
from minimind_train.progress import Say, say_on_stderr
from minimind_train.runs import RunRecord
from minimind_train.start import Origin
from minimind_train.trained import Which, model_of


def evaluate_run(
    run: Path,
    dataset: Path,
    *,
    step: Which = None,
    num_windows: int | None = None,
    batch: int = 32,
    device: str = "auto",
    say: Say = say_on_stderr,
) -> Evaluation:
    """Measure the model of a run as the run itself does with `--val-shards`.

    Args:
        run: its folder; it may still be training.
        dataset: the folder of a dataset of the run's tokenizer.
        step: whose checkpoint; the newest whole one by default, or `best`.
        num_windows: how many windows, spread evenly; all by default.
        batch: windows that go through the model at once.
        device: where to compute.
        say: takes lines for the user.

    Raises:
        UserError: there is no such run, checkpoint or dataset, or the tokenizers differ; the message shows both sides.
    """
    record = RunRecord.read(run)
    shards = ShardSet.open(dataset)
    here = shards.manifest.tokenizer
    if here != record.tokenizer:
        raise UserError(
            f"{dataset}: its tokenizer ({here.vocab_size:,} entries, {here.sha256[:12]}…) is not that of {run} "
            f"({record.tokenizer.vocab_size:,} entries, {record.tokenizer.sha256[:12]}…); tokenize its text again with "
            f"--tokenizer {run}"
        )
    known = {**record.options, "shards": words_of(record.options["shards"]), "stretches": ()}
    place = resolve_device(device)
    evaluator = open_evaluator(
        shards,
        num_windows=num_windows,
        batch=batch,
        device=place,
        dtype=build(RunConfig, record.options).dtype,
        announce=say,
        **window_options(build(DataConfig, known)),
    )
    model = model_of(run, step=step, say=say).to(place)
    if shards.manifest.kind != "dpo":
        return evaluator.measure(NextToken(model))
    return evaluator.measure(_of_pairs(model, run, record, dataset, say))


def _of_pairs(model: MiniMind, run: Path, record: RunRecord, dataset: Path, say: Say) -> Objective:
    """Return the objective of a run of dpo, compared with the model that it began from."""
    if record.command != DPO.command:
        raise UserError(
            f"{dataset}: a dataset of pairs, and {run} is a run of {record.command}; pairs say how far a run of `mm-train dpo` has "
            "come from the model that it began from"
        )
    config = from_options(DpoConfig, record.options, run)
    online = replace(config, reference=replace(config.reference, reference="online"))
    return DPO.objective(model, online, Origin(config, say))
