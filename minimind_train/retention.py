"""Which checkpoints of a run are kept when a new one is saved: the newest few, some for good, and the best.

When a checkpoint is due is in `saver`, what one is in `checkpoint`.
"""

from dataclasses import dataclass
from pathlib import Path

from minimind_train import checkpoint


@dataclass(frozen=True, kw_only=True)
class Retention:
    """What a checkpoint can have for a reason to stay; one is enough."""

    newest: int = 3
    """It is one of so many newest ones; 0 keeps all."""
    every: int = 0
    """Its step is a multiple of this; 0 is no reason."""
    best: bool = False
    """It has the lowest validation loss."""

    def apply(self, run: Path, *, newest: int) -> None:
        """Delete the checkpoints of a run that have no reason to stay, the newest whole one being of step `newest`."""
        # Anything newer was passed over as damaged, so it must not count among those that stay.
        there = [step for step in checkpoint.steps_of(run) if step <= newest]
        stay = set(there[-self.newest :] if self.newest else there)
        if self.every:
            stay |= {step for step in there if step % self.every == 0}
        if self.best and (best := checkpoint.best_of(run, last_step=newest)):
            stay.add(best.step)
        for step in there:
            if step not in stay:
                checkpoint.delete(checkpoint.folder_of(run, step))
