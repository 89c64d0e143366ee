"""The initial weights of a run: random ones, or the weights of another model.

Weights of another model decide the shape of the model. Their checksum is noted in the run's options, so that whatever needs them again (a
resume before the first checkpoint, a run whose checkpoints do not hold all weights) gets the same weights or a plain error.
"""

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path

from minimind_data.errors import UserError
from minimind_data.options import flatten, options_from
from minimind_data.tokenizer.loading import refuse_other_tokenizer, same_encoding
from minimind_train.batches.datasets import Datasets
from minimind_train.model.config import ModelConfig
from minimind_train.model.transformer import MiniMind
from minimind_train.progress import Say
from minimind_train.resume_policy import Resume, names_of
from minimind_train.run.options import RunOptions
from minimind_train.weights.foreign import ResumePoint
from minimind_train.weights.loading import Weights, checksum_of_tensors, load_initial_weights, load_weights

__all__ = ["InitialWeights", "with_initial_weights"]


def with_initial_weights(
    options: RunOptions, shards: Datasets, names_given: Collection[str] | None, say: Say
) -> tuple[RunOptions, Weights | None]:
    """Return the options of a new run, with the model's shape taken from its initial weights, and these weights; None for random ones.

    Args:
        options: as the user gave them.
        shards: the datasets of the run.
        names_given: which of the options the user wrote; by default, those that differ from their defaults.
        say: takes lines about damaged checkpoints.

    Raises:
        UserError: there are no such weights, or their shape is not what the user gave, or their tokenizer is not the dataset's.
    """
    origin = options.start.from_weight
    if origin is None:
        if options.lora.lora_rank:
            raise UserError(
                "`lora_rank` puts adapters beside weights that are there",
                remedy="pass them by `from_weight`",
                option="lora_rank",
            )
        return options, None
    weights = load_weights(Path(origin), step=options.start.from_step, shape=options.model, say=say)
    _check_tokenizer(origin, weights, shards, say)
    if weights.resume_point is not None:
        say(_what_is_not_taken(origin, weights.resume_point, options))
    here, there = flatten(options.model), flatten(weights.config)
    if names_given is None:
        defaults = flatten(type(options)().model)
        names_given = [name for name, value in here.items() if value != defaults[name]]
    given_here = here.keys() & set(names_given)
    for name in sorted(given_here & names_of(ModelConfig, Resume.SHAPE)):
        if here[name] != there[name]:
            raise UserError(
                f"its {name} is {there[name]}, and `{name}` says {here[name]}",
                where=origin,
                remedy=f"the weights decide the shape of the model, so leave `{name}` out",
                option=name,
            )
    chosen = {name: here[name] for name in names_of(ModelConfig, Resume.TRAINING) | given_here}
    try:
        model = options_from(ModelConfig, {**there, **chosen})
        options.lora.refuse_unfit(model)
    except ValueError as error:
        raise UserError(f"its model cannot be changed like that: {error}", where=origin) from None
    start = replace(
        options.start,
        from_weight=str(Path(origin).resolve()),
        from_step=weights.step,
        from_sha256=checksum_of_tensors(weights.tensors),
    )
    return replace(options, model=model, start=start), weights


class InitialWeights:
    """The initial weights of a run, loaded when they are first needed.

    Args:
        options: the run's, which say which weights these are.
        say: takes lines about damaged checkpoints.
        weights: the same, where they have just been loaded.
    """

    def __init__(self, options: RunOptions, say: Say, weights: Weights | None = None) -> None:
        self._options = options
        self._say = say
        self._weights = weights

    @property
    def checksum(self) -> str | None:
        """Of the weights; None where the run began from none."""
        return self._options.start.from_sha256

    def weights(self, why: str) -> Weights | None:
        """Return them, or None where the run began from none.

        Args:
            why: what they are needed for, such as `the run has no checkpoint yet`.

        Raises:
            UserError: they are gone, or others.
        """
        start = self._options.start
        if self._weights is None and start.from_weight is not None:
            if start.from_sha256 is None:
                raise UserError(
                    "the run began from no weights, so leave `from_weight` out", option="from_weight"
                )
            self._weights = load_initial_weights(start, self._options.model, why, self._say)
        return self._weights

    def model(self, why: str) -> MiniMind:
        """Return a frozen model of these weights, in evaluation mode, on the CPU; for a run that began from weights."""
        weights = self.weights(why)
        assert weights is not None
        model = MiniMind(weights.config).eval().requires_grad_(False)
        model.load_state_dict(weights.tensors)
        return model

    def release(self) -> None:
        """Give their memory back; whoever needs them again loads them again."""
        self._weights = None


def _what_is_not_taken(origin: str, point: ResumePoint, options: RunOptions) -> str:
    """Return a line on what a run leaves of MiniMind's resume file, and how it begins behind the samples that were learned."""
    samples = point.step * options.training.micro_batch * point.processes
    of_processes = f" of {point.processes} processes" if point.processes > 1 else ""
    line = (
        f"{origin}: MiniMind's run stood in its epoch {point.epoch + 1} after step {point.step}{of_processes}. Its weights are taken; its "
        "optimizer's moments, its learning rate and its step are not, so this run begins at step 0"
    )
    if samples and not (options.data.skip_positions or options.data.resume_from):
        line += (
            f". If its batch_size was {options.training.micro_batch}, as `micro_batch` is here, it had learned from {samples:,} samples of "
            f"that epoch: `skip_positions` 0:{samples} leaves as many out here, where the order is another draw"
        )
    return line


def _check_tokenizer(origin: str, weights: Weights, shards: Datasets, say: Say) -> None:
    """Refuse weights whose ids mean other texts than the dataset's; a file that says nothing of its tokenizer is believed."""
    text = weights.tokenizer_json
    if text is None and weights.tokenizer != shards.tokenizer:
        say(f"{origin}: says nothing of its tokenizer; it must be that of {shards.folder}")
        return
    refuse_other_tokenizer(
        (origin, weights.tokenizer),
        (shards.folder, shards.tokenizer),
        why="the weights know the ids of theirs alone",
        remedy=f"tokenize the text again with `tokenizer` {origin}",
        # A run's is a copy of its dataset's; other programs write the same one in their own way.
        same=lambda: (
            weights.step is None and text is not None and same_encoding(text, shards.sets[0].tokenizer_json)
        ),
    )
