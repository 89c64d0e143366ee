"""Building the learner of a rank: the model, its objective and its optimizer, new or in the state of a checkpoint."""

from minimind_train.model.config import trained_parameters
from minimind_train.model.lora import add_adapters
from minimind_train.model.precision import LossScale
from minimind_train.model.transformer import MiniMind, initialize
from minimind_train.run.initial import InitialWeights
from minimind_train.run.options import RunOptions
from minimind_train.run.phases import PHASES
from minimind_train.run_folder.checkpoint import Checkpoint
from minimind_train.training.data_parallel import parallelize
from minimind_train.training.learner import Compute, Learner
from minimind_train.training.optim import make_optimizer

__all__ = ["build_learner"]


def build_learner(
    options: RunOptions, origin: InitialWeights, latest: Checkpoint | None, compute: Compute
) -> Learner:
    """Return the learner of this rank.

    Args:
        options: the run's, resolved.
        origin: the initial weights of the run.
        latest: the checkpoint that the run is resumed from, if any.
        compute: where the rank computes, and with which others.

    Raises:
        UserError: the initial weights are needed, and they are gone or have changed.
    """
    training, lora, world = options.training, options.lora, compute.world
    if latest:
        latest.refuse_larger_model(trained_parameters(options.model, lora))
    model = MiniMind(options.model)
    why = f"{training.run} learns adapters alone" if latest else f"{training.run} has no checkpoint yet"
    # Rank 0's weights become those of all ranks in `parallelize`.
    weights = origin.weights(why) if world.is_main and (latest is None or lora.lora_rank) else None
    if weights:
        model.load_state_dict(weights.tensors)
    else:
        initialize(model, training.seed)
    if lora.lora_rank:
        add_adapters(model, lora, training.seed)
    objective = PHASES[options.command].objective(model, options, origin)
    wrapped = parallelize(objective, compute, training.parallel)
    optimizer = make_optimizer(model, options.optim)
    if latest:
        latest.restore(model, optimizer)
    scale = LossScale(**(latest and latest.state.loss_scale) or {}) if compute.dtype == "fp16" else None
    return Learner(
        objective=objective,
        wrapped=wrapped,
        optimizer=optimizer,
        optim=options.optim,
        scale=scale,
        compute=compute,
    )
