"""SHA-256 of whole inputs, computed in the background while they are tokenized."""

import threading
from collections.abc import Sequence

from minimind_data.dataset.format import InputEntry
from minimind_data.errors import UserError
from minimind_data.files import sha256_of_stream
from minimind_data.inputs.sources import Source


class InputHashes:
    """Hashes whole inputs in the background, and notices an input that changes meanwhile."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self._sources = sources
        self._stamps = [source.stamp() for source in sources]
        self._digests: list[str] = []
        self._failure: UserError | None = None
        self._thread = threading.Thread(target=self._hash, daemon=True)

    def begin(self) -> None:
        """Start reading the inputs in the background; `entries` would start it otherwise."""
        if self._thread.ident is None:
            self._thread.start()

    def entries(self) -> tuple[InputEntry, ...]:
        """Wait for the hashes, and return what a manifest says of the inputs.

        Raises:
            UserError: an input changed since this object was made, or cannot be read.
        """
        self.begin()
        self._thread.join()
        if self._failure is not None:
            raise self._failure
        for source, stamp in zip(self._sources, self._stamps, strict=True):
            with source.reading():
                if source.stamp() != stamp:
                    raise UserError(
                        "was changed while it was being read",
                        where=source.name,
                        remedy="run the same command again",
                    )
        return tuple(
            InputEntry(path=source.name, bytes=stamp[0], sha256=digest, form=source.form)
            for source, stamp, digest in zip(self._sources, self._stamps, self._digests, strict=True)
        )

    def _hash(self) -> None:
        try:
            for source in self._sources:
                with source.reading(), source.open() as file:
                    self._digests.append(sha256_of_stream(file))
        except UserError as error:
            self._failure = error
