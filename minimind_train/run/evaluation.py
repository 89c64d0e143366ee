"""Evaluating a trained model, of a run, a Hugging Face folder or MiniMind's `.pth`, on any dataset of its tokenizer: `mm-train eval`.

The windows and the objective are those of the run; the evaluation itself is in `training.evaluate`.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from minimind_data.dataset.shard_set import ShardSet
from minimind_data.errors import UserError
from minimind_data.tokenizer.loading import refuse_other_tokenizer, same_encoding
from minimind_data.windows.base import Layout
from minimind_train.batches.options import window_options
from minimind_train.model.config import Dtype
from minimind_train.model.precision import resolve_dtype
from minimind_train.model.transformer import MiniMind
from minimind_train.objectives.objective import NextToken, Objective
from minimind_train.parallel.devices import resolve_device
from minimind_train.progress import Say, WindowProgress, say_on_stderr
from minimind_train.run.initial import InitialWeights
from minimind_train.run.options import DpoOptions, PretrainOptions, options_of
from minimind_train.run.phases import PHASES
from minimind_train.run_folder.options import CheckpointChoice
from minimind_train.run_folder.places import with_present_places
from minimind_train.run_folder.record import RunRecord
from minimind_train.training.evaluate import Evaluation, open_evaluator
from minimind_train.training.learner import Compute
from minimind_train.weights.loading import open_model


def evaluate(
    run: Path | str,
    dataset: Path | str,
    *,
    checkpoint: CheckpointChoice = None,
    windows: int | None = None,
    micro_batch: int = 32,
    device: str = "auto",
    dtype: Dtype | None = None,
    seq_len: int | None = None,
    layout: Layout | None = None,
    changes: Mapping[str, Any] = MappingProxyType({}),
    tokenizer: Path | str | None = None,
    lora: Path | str | None = None,
    say: Say = say_on_stderr,
) -> Evaluation:
    """Evaluate a model as its run does by `val_shards`.

    Args:
        run: the folder of a run, which may still be training, a Hugging Face folder, or MiniMind's `.pth`.
        dataset: the folder of a dataset with the model's tokenizer.
        checkpoint: the step of one, or `best`; by default the newest complete one.
        windows: how many, spread evenly; all by default.
        micro_batch: windows in one forward pass.
        device: where to compute.
        dtype: of matrix products; by default the run's, and `auto` for weights that are no run's.
        seq_len: of the windows; by default the run's.
        layout: of the windows; by default the run's.
        changes: options of the model: those that are to differ, such as those of its positions, or that a `.pth` does not tell.
        tokenizer: of weights that are no run's, where it is not beside them or MiniMind's own.
        lora: a file of MiniMind's adapters, which are merged into the weights.
        say: takes lines for the user.

    Raises:
        UserError: there is no such model, checkpoint or dataset, or the tokenizers differ; the message shows both sides.
    """
    run, dataset = Path(run), Path(dataset)
    trained = open_model(run, step=checkpoint, say=say, changes=changes, tokenizer=tokenizer, lora=lora)
    shards = ShardSet.open(dataset)
    refuse_other_tokenizer(
        (shards.folder, shards.manifest.tokenizer),
        (run, trained.tokenizer.info),
        why="a model knows the ids of its own alone",
        remedy=f"tokenize the text again with `tokenizer` {trained.tokenizer_folder}",
        # A run's is a copy of its dataset's; other programs write the same one in their own way.
        same=lambda: trained.record is None and same_encoding(trained.tokenizer.json, shards.tokenizer_json),
    )
    options = options_of(trained.record, run) if trained.record else PretrainOptions()
    data = options.data
    if seq_len is not None:
        data = replace(data, seq_len=seq_len)
    if layout is not None:
        data = replace(data, layout=layout, document_mask=layout == "pack")
    if data.seq_len > (longest := trained.model.config.longest_sequence):
        raise UserError(
            f"its model reads at most {longest} tokens, and the windows have {data.seq_len}",
            where=run,
            remedy="take a smaller `seq_len`, or stretch the positions by `inference_rope_scaling`",
            option="seq_len",
        )
    where = resolve_device(device)
    compute = Compute(device=where, dtype=resolve_dtype(dtype or options.training.dtype, where))
    evaluator = open_evaluator(
        shards,
        num_windows=windows,
        batch_size=micro_batch,
        compute=compute,
        say=say,
        **window_options(data),
    )
    model = trained.model.to(where)
    if shards.manifest.kind == "dpo":
        objective = _of_pairs(model, run, trained.record, dataset, say)
    else:
        objective = NextToken(model)
    with WindowProgress(evaluator.num_windows) as progress:
        return evaluator.measure(objective, report=progress.add)


def _of_pairs(model: MiniMind, run: Path, record: RunRecord | None, dataset: Path, say: Say) -> Objective:
    """Return the objective of a run of dpo, whose reference is the model that it began from."""
    if record is None or record.command != DpoOptions.command:
        what = "no run" if record is None else f"a run of {record.command}"
        raise UserError(
            f"a dataset of pairs, and {run} is {what}; pairs say how far a run of `mm-train dpo` has come "
            "from the model that it began from",
            where=dataset,
        )
    options = options_of(with_present_places(record, run, say, names=("from_weight",)), run)
    assert isinstance(options, DpoOptions)
    online = replace(options, objective=replace(options.objective, reference="online"))
    return PHASES[options.command].objective(model, online, InitialWeights(options, say))
