"""How reading, encoding and writing overlap: an iterator that runs ahead in a thread, and blocks that several threads encode at a time.

Both keep the order of their items, and raise an exception where its item would have come.
"""

import queue
import threading
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

from minimind_data.errors import UserError
from minimind_data.inputs.blocks import Block
from minimind_data.tokenizer.backends import Encoder, Ids, Offsets, ReferenceEncoder

_ITEMS_AHEAD = 2

_T = TypeVar("_T")


class DifferenceError(Exception):
    """The fast backend failed, or encoded a document differently than the reference."""


def encode_blocks(
    encoder: Encoder, blocks: Iterator[Block], num_threads: int
) -> Generator[tuple[Block, Ids, Offsets], None, None]:
    """Encode several blocks at a time, and yield each with its ids and offsets, in order.

    Raises:
        DifferenceError: a fast encoder failed.
    """
    waiting: deque[tuple[Block, Future[tuple[Ids, Offsets]]]] = deque()
    pool = ThreadPoolExecutor(num_threads)
    try:
        for block in blocks:
            waiting.append((block, pool.submit(_encode_block, encoder, block.texts)))
            if len(waiting) > num_threads:
                yield _first_of(waiting)
        while waiting:
            yield _first_of(waiting)
    finally:
        pool.shutdown(cancel_futures=True)


def _first_of(waiting: deque[tuple[Block, Future[tuple[Ids, Offsets]]]]) -> tuple[Block, Ids, Offsets]:
    block, future = waiting.popleft()
    return block, *future.result()


def _encode_block(encoder: Encoder, texts: list[str]) -> tuple[Ids, Offsets]:
    try:
        return encoder.encode_batch(texts)
    except (KeyboardInterrupt, SystemExit, MemoryError, UserError):
        raise
    except BaseException as error:  # a panic in Rust is not an Exception
        if encoder.name == ReferenceEncoder.name:
            raise
        raise DifferenceError(f"it failed: {type(error).__name__}: {error}") from None


def ahead(items: Generator[_T, None, None]) -> Generator[_T, None, None]:
    """Run an iterator in a thread of its own, a few items ahead; an exception of it is raised where its next item would come."""
    ready: queue.Queue[_T | _End] = queue.Queue(_ITEMS_AHEAD)
    stopped = threading.Event()

    def put(item: _T | _End) -> None:
        while not stopped.is_set():
            try:
                ready.put(item, timeout=0.1)
            except queue.Full:
                continue
            return

    def produce() -> None:
        end = _End()
        try:
            for item in items:
                put(item)
                if stopped.is_set():
                    break
        except BaseException as error:  # noqa: BLE001 - the consumer raises it, whatever it is
            end = _End(error)
        finally:
            items.close()
            put(end)

    thread = threading.Thread(target=produce, daemon=True)
    thread.start()
    try:
        while not isinstance(item := ready.get(), _End):
            yield item
        if item.error is not None:
            raise item.error
    finally:
        stopped.set()
        thread.join()


@dataclass(frozen=True)
class _End:
    """Follows the last item of an iterator, with the exception that ended it, if one did."""

    error: BaseException | None = None
