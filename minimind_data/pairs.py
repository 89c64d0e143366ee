"""Windows of pairs (`dpo`): a chosen and a rejected conversation side by side, each cut or padded to length as in layout `pad`."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from minimind_data.layouts import PadWindows
from minimind_data.segments import Segments
from minimind_data.shards import ShardSet

SIDES = ("chosen", "rejected")


class PairWindows(PadWindows):
    """One pair a window.

    A sample has `chosen_input_ids`, `chosen_targets`, `rejected_input_ids` and `rejected_targets` (`…_labels`, unshifted), each
    int64 [L]. What speaks of one sequence in a window, `segments`, `document_ids` and `locate`, speaks of the chosen one.
    """

    def __init__(self, shards: ShardSet, seq_len: int, *, labels: bool) -> None:
        super().__init__(shards, seq_len, labels=labels, documents_apart=False)

    @property
    def num_places(self) -> int:
        """Input positions of all windows, both sides."""
        return len(SIDES) * super().num_places

    def fetch(self, windows: NDArray[np.int64]) -> dict[str, NDArray[np.int64]]:
        """Return a batch, each array [B, L]; see `Windows.fetch`."""
        self._check(windows, len(self))
        sample: dict[str, Any] = {}
        for place, side in enumerate(SIDES):
            made = self._sample(*self._padded(*self._spans(len(SIDES) * windows + place)), None)
            sample |= {f"{side}_{name}": array for name, array in made.items()}
        return sample

    def segments(self, windows: NDArray[np.int64]) -> Segments:
        """Return the chosen sequences of a batch; see `Windows.segments`."""
        self._check(windows, len(self))
        return self._segments(windows, *self._spans(len(SIDES) * windows))

    def will_need(self, windows: NDArray[np.int64]) -> None:
        """Tell the system that windows are read soon; see `Windows.will_need`."""
        self._check(windows, len(self))
        starts, lengths = self._spans((len(SIDES) * windows[:, None] + np.arange(len(SIDES))).ravel())
        self.shards.will_need(starts, starts + lengths)

    def locate(self, window: int) -> tuple[str, int]:
        """Return where the chosen sequence begins; see `Windows.locate`."""
        starts, _ = self._spans(np.array([len(SIDES) * window]))
        return self.shards.name_and_offset(int(starts[0]))

    def window_of(self, shard: str, offset: int) -> int:
        """Return the pair that holds a token; see `Windows.window_of`."""
        self.shards.token_at(shard, offset)
        index = self.shards.index_of(shard)
        sequence = int(self.shards.sequence_starts[index]) + self.shards.shard(index).sequence_of(offset)
        return sequence // len(SIDES)

    def _learns(self, windows: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Tell in which pairs both sides have a target: the loss compares them."""
        learns = np.ones(len(windows), np.bool_)
        for place in range(len(SIDES)):
            learns &= (self._cut_mask(*self._spans(len(SIDES) * windows + place))[:, 1:] != 0).any(axis=1)
        return learns
