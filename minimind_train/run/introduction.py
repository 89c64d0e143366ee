"""What a run says before its first step: the model, the device, the data, and the step and position it begins at."""

from collections.abc import Iterator

from minimind_train.model.config import parameter_line
from minimind_train.model.lora import adapters_of
from minimind_train.progress import TrainingProgress
from minimind_train.run.data import RunData
from minimind_train.run.options import RunOptions
from minimind_train.training.learner import Learner

__all__ = ["introduction"]


def introduction(
    options: RunOptions, data: RunData, learner: Learner, progress: TrainingProgress, position: int
) -> Iterator[str]:
    """Yield the lines.

    Args:
        options: the run's, resolved.
        data: what it reads.
        learner: what learns.
        progress: the steps that are done.
        position: of the next sample.
    """
    training, model, compute = options.training, learner.model, learner.compute
    yield parameter_line(options.model)
    if options.lora.lora_rank:
        num_learned = sum(each.numel() for each in model.parameters() if each.requires_grad)
        yield f"{num_learned / 1e6:.2f}M parameters of adapters are learned, in {len(adapters_of(model))} matrices"
    device, processes = compute.device.type, compute.world.size
    devices = device if processes == 1 else f"{device}, {processes} processes by {training.parallel},"
    yield (
        f"{training.run}: on {devices} in {training.dtype}, {len(data.windows):,} windows of {data.windows.seq_len} tokens"
    )
    yield from data.introduce(position)
    step, total_steps = progress.step, progress.total_steps
    begin = f"going on after step {step} of {total_steps}" if step else f"step 1 of {total_steps}"
    details = "".join(
        f", {name} {value}" for name, value in data.describe(position).items() if name != "epochs"
    )
    yield f"{begin} at position {position}{details}"
