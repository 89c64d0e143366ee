"""Layout pack over whole epochs: every document once and whole, for each shape of corpus; one plan, whoever wants it."""

import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest

from minimind_data.windows.opening import open_windows
from minimind_data.windows.pack_plan import LONG_DOCUMENTS
from minimind_train.order.sample_order import SampleOrder

SEQ_LEN = 63
WIDTH = SEQ_LEN + 1


def heavy_tailed(count):
    return np.minimum(3 + 8 * np.random.default_rng(0).pareto(1.1, count), 5000).astype(int).tolist()


def like_text(count):
    return np.clip(np.exp(np.random.default_rng(1).normal(3, 1, count)), 2, 2000).astype(int).tolist()


CORPORA = {
    "all equal": [17] * 400,
    "all as long as a window": [WIDTH] * 50,
    "all just over half a window": [WIDTH // 2 + 1] * 150,
    "all longer than a window": [WIDTH + 1 + number % 90 for number in range(120)],
    "one document": [30],
    "one long document": [1000],
    "the shortest": [2] * 500,
    "two that do not fit together": [40, 30] * 100,
    "heavy tail": heavy_tailed(600),
    "like text": like_text(600),
}


def parts_of(length, long_documents):
    """The (first token, tokens) of each part of a document that stands in windows, its EOS at a cut left aside."""
    if length <= WIDTH:
        return [(0, length)]
    if long_documents == "drop":
        return []
    if long_documents == "cut":
        return [(0, WIDTH)]
    return [(start, min(WIDTH, length - start)) for start in range(0, length - 1, WIDTH - 1)]


@pytest.mark.parametrize("long_documents", LONG_DOCUMENTS)
@pytest.mark.parametrize("corpus", CORPORA)
def test_an_epoch_has_every_document_once_and_whole(make_dataset, corpus, long_documents):
    lengths = CORPORA[corpus]
    shards = make_dataset([lengths[: len(lengths) // 3], lengths[len(lengths) // 3 :]])
    wanted = Counter(
        (document, start, length)
        for document, total in enumerate(lengths)
        for start, length in parts_of(total, long_documents)
    )
    if not wanted:
        return  # nothing but what is to be dropped, which opening refuses; see test_pack_windows.py
    windows = open_windows(shards, layout="pack", seq_len=SEQ_LEN, long_documents=long_documents)
    begins = np.cumsum([0, *lengths])
    stream = np.concatenate([shard.tokens for shard in shards]).astype(int)
    order = SampleOrder(num_windows=len(windows), seed=9)
    for epoch in range(2):
        seen: Counter = Counter()
        for first in range(0, len(windows), 32):
            positions = np.arange(first, min(first + 32, len(windows))) + epoch * len(windows)
            numbers = order.windows(positions)
            found = windows.segments(numbers)
            assert (found.filled <= WIDTH).all()
            inputs = windows.fetch(numbers)["input_ids"]
            for row, column, length, document, start in zip(
                found.rows, found.columns, found.lengths, found.documents, found.starts, strict=True
            ):
                seen[int(document), int(start - begins[document]), int(length)] += 1
                # Its tokens stand there, but for the EOS that takes the place of the last one of a document that is cut.
                shown = min(length, SEQ_LEN - column)
                kept = shown - (
                    long_documents == "cut" and lengths[document] > WIDTH and column + length <= SEQ_LEN
                )
                assert inputs[row, column : column + kept].tolist() == stream[start : start + kept].tolist()
        assert seen == wanted


@pytest.mark.parametrize("corpus", ["heavy tail", "like text", "all equal", "the shortest"])
def test_windows_are_filled_where_lengths_allow_it(make_dataset, corpus):
    """All but the last window, as near to full as the number of tokens allows: within half a percent."""
    lengths = CORPORA[corpus] * 20
    windows = open_windows(make_dataset([lengths]), layout="pack", seq_len=SEQ_LEN, long_documents="fragment")
    tokens = sum(sum(length for _, length in parts_of(total, "fragment")) for total in lengths)
    fits = WIDTH // 17 * 17 if corpus == "all equal" else WIDTH  # three of 17 tokens, and nothing beside them
    assert tokens / (len(windows) * fits) > 0.995
    assert windows.plan.num_tokens == tokens


_PLANNING = """
import hashlib, sys, time
from pathlib import Path
from minimind_data.windows.pack_plan import open_plan
from minimind_data.dataset.shard_set import ShardSet
said, folder = [], Path(sys.argv[1])
Path(sys.argv[2]).touch()
while not (folder / "go").exists():
    time.sleep(0.01)
plan = open_plan(ShardSet.open(folder), int(sys.argv[3]), "cut", said.append)
digest = hashlib.sha256(plan.offsets.tobytes() + plan.documents.tobytes()).hexdigest()
print(digest, sum("planning which of" in line for line in said))
"""


@pytest.mark.distributed
def test_of_several_processes_one_plans(make_dataset, tmp_path):
    shards = make_dataset([like_text(3000)])
    ready = [tmp_path / f"ready-{number}" for number in range(4)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _PLANNING, str(shards.folder), str(path), str(WIDTH)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for path in ready
    ]
    deadline = time.monotonic() + 120
    while not all(path.exists() for path in ready):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    (shards.folder / "go").touch()
    answers = [process.communicate(timeout=120)[0].split() for process in processes]
    assert [process.returncode for process in processes] == [0] * 4
    assert len({digest for digest, _ in answers}) == 1
    assert sorted(planned for _, planned in answers) == ["0", "0", "0", "1"]
