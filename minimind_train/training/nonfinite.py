"""Steps whose loss or gradient is not finite: which samples caused it, and whether the run goes on.

`training.step` notices such a step; overflows that fp16 makes up for by a smaller loss scale are in `model.precision`.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from minimind_data.errors import UserError
from minimind_train.batches.steps import StepBatch
from minimind_train.order.skips import Skips
from minimind_train.progress import Say
from minimind_train.training.learner import Learner
from minimind_train.training.options import MOST_IN_A_ROW, OnNonfinite
from minimind_train.training.step import NotFiniteError


class NonfiniteGuard:
    """Decides whether a run goes on after a step whose loss or gradient is not finite, and says which samples caused it.

    Args:
        learner: what learns. All its ranks come to the same decision.
        policy: stop at the first such step, or skip it.
        run: the run's folder.
        skipped: steps that were skipped before this part of the run.
        say: takes lines for the user.

    Attributes:
        skipped: all steps that were skipped.
    """

    def __init__(
        self,
        learner: Learner,
        policy: OnNonfinite,
        *,
        run: Path,
        skipped: int = 0,
        say: Say,
    ) -> None:
        self.skipped = skipped
        self._learner = learner
        self._policy = policy
        self._run = str(run)
        self._say = say
        self._last_step = -1
        self._in_a_row = 0

    def handle(
        self, error: NotFiniteError, step: int, batch: StepBatch, *, positions: NDArray[np.int64]
    ) -> None:
        """Count a step that updated no weight, and name the positions that are not finite by themselves.

        Args:
            error: says what was not finite.
            step: the step's number.
            batch: this rank's share of the step.
            positions: those of the whole step.

        Raises:
            UserError: the policy is to stop, or too many steps in a row were skipped.
        """
        self._in_a_row = self._in_a_row + 1 if step == self._last_step + 1 else 1
        self._last_step = step
        self.skipped += 1
        culprits = self._culprits(batch, positions)
        ranges = Skips.of([f"{position}:{position + 1}" for position in culprits]).as_texts()
        origin = (
            f"from {_listed(culprits)} of the"
            if culprits
            else "from no window alone but from the whole of the"
        )
        what = f"{error} at step {step}, {origin} positions {batch.start} to {batch.stop - 1}"
        look = f"look there with `locate({self._run!r}, position={(*culprits, batch.start)[0]})`"
        if self._policy == "skip" and self._in_a_row < MOST_IN_A_ROW:
            self._say(
                f"{what}; the step is skipped ({self._in_a_row} in a row, at {MOST_IN_A_ROW} the run ends); {look}"
            )
            return
        again = f"{self._in_a_row} steps in a row: " if self._policy == "skip" else ""
        changes = {"skip_positions": list(ranges or (f"{batch.start}:{batch.stop}",))}
        raise UserError(
            f"{again}{what}; no weight has moved and the checkpoints before are intact",
            remedy=f"{look}, leave it out with `resume({self._run!r}, {changes})`, let such steps be skipped by "
            "`on_nonfinite` skip, or begin a new run with a lower `learning_rate`, a `warmup_steps` or `dtype` fp32",
            option="on_nonfinite",
        )

    def _culprits(self, batch: StepBatch, positions: NDArray[np.int64]) -> list[int]:
        """Return the positions whose windows alone have a loss that is not finite; none if only the gradient is not finite."""
        world = self._learner.compute.world
        windows = [
            {name: tensor[row : row + 1] for name, tensor in micro_batch.items()}
            for micro_batch in batch.micro_batches
            for row in range(len(next(iter(micro_batch.values()))))
        ]
        if batch.rows is not None:
            windows = [windows[row] for row in np.argsort(batch.rows)]
        flags = [0.0] * len(positions)
        for row in range(-(-len(positions) // world.size)):
            number = world.rank + row * world.size
            # Where weights are sharded, all ranks must make the same number of passes.
            window = windows[row] if number < len(positions) else (batch.padding_batch or windows[0])
            with torch.no_grad(), self._learner.compute.forward():
                loss = self._learner.objective(window).summed
            if number < len(positions):
                flags[number] = float(not loss.isfinite())
        is_culprit = np.array(world.all_reduce_sum(flags)) > 0
        culprits: list[int] = positions[is_culprit].tolist()
        return culprits


def _listed(positions: Sequence[int]) -> str:
    most = 5
    first_positions = ", ".join(map(str, positions[:most]))
    more = f" and {len(positions) - most} more" if len(positions) > most else ""
    return (
        f"position {first_positions}{more}" if len(positions) == 1 else f"positions {first_positions}{more}"
    )
