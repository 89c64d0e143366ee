"""The loaders that peers_load.py compares, the results of each, and the table of results."""

import statistics
from dataclasses import dataclass, field

from environments import pinned_version
from processes import Memory

SEQ_LEN = 512
_WORKERS = (0, 2)
_HUGE = (10**9,)
_GROWING = (10**6, 10**7)


@dataclass(frozen=True)
class Peer:
    """A loader, ours or another project's."""

    how: str
    data: str
    """Whose files it reads; loaders that read the same share them."""
    environment: str = ""
    """The name of its requirements; without one it runs in ours."""
    package: str = ""
    stride: int = SEQ_LEN
    """Of its windows in the stream."""
    sizes: tuple[int, ...] = _HUGE
    """Windows of the datasets at whose middle it resumes."""
    check: str = "windows"
    workers: tuple[int, ...] = _WORKERS


ALL = {
    "ours": Peer("StepLoader, one thread", "ours", workers=(0,)),
    "ours_blocks": Peer("StepLoader, shuffled in blocks of 1,024 windows", "ours", workers=(0,)),
    "ours_in_order": Peer("StepLoader, not shuffled", "ours", workers=(0,)),
    "ours_torch": Peer("WindowDataset and ResumableBatchSampler in torch's DataLoader", "ours"),
    "minimind": Peer(
        "its method in our words: tokenizes in __getitem__, walks to its place",
        "minimind",
        "minimind",
        "transformers",
        sizes=_GROWING,
        check="texts",
    ),
    "megatron": Peer(
        "GPTDataset, its index made before",
        "megatron",
        "megatron",
        "megatron-core",
        sizes=_GROWING,
        check="tokens",
    ),
    "nanogpt": Peer(
        "get_batch in our words; no order, so no place", "flat", sizes=(), check="places", workers=(0,)
    ),
    "datatrove": Peer(
        "DatatroveFolderDataset, not shuffled", "datatrove", "datatrove-load", "datatrove", SEQ_LEN + 1
    ),
    "litdata": Peer("TokensLoader, StreamingDataLoader", "litdata", "litdata", "litdata", SEQ_LEN + 1),
    "streaming": Peer(
        "StreamingDataset, py1e", "streaming", "streaming", "mosaicml-streaming", sizes=_GROWING
    ),
    "grain": Peer("MapDataset.shuffle over a memory map", "flat", "grain", "grain"),
    "torch": Peer("DataLoader, randperm as a list, a memory map", "flat", sizes=_GROWING),
}


@dataclass
class Result:
    """What is known of a loader."""

    workers_cold: int = 0
    workers_warm: int = 0
    data: str = ""
    index: str = ""
    """What a first opening takes longer, where it does."""
    reading: Memory | None = None
    resuming: Memory | None = None
    imports_mb: float = 0.0
    smaller: dict[int, float] = field(default_factory=dict)
    """Seconds to resume at fewer windows."""
    rounds: list[dict[str, float]] = field(default_factory=list)


def power(windows: int) -> str:
    """Return a power of ten as text."""
    return f"10^{len(str(windows)) - 1}"


def _cell(name: str, key: str, results: dict[str, Result], scale: float, digits: int) -> str:
    """Return the median of a figure over the rounds, and by what factor ours is better."""
    mine = [figures[key] for figures in results["ours"].rounds]
    theirs = [figures[key] for figures in results[name].rounds]
    text = f"{statistics.median(theirs) * scale:,.{digits}f}"
    if name == "ours":
        return text
    better = [b / a if key not in ("warm", "cold") else a / b for a, b in zip(mine, theirs, strict=True)]
    return f"{text} ({statistics.median(better):,.1f}×)"


def _memory(memory: Memory | None, imports_mb: float) -> str:
    return f"{max(0, memory.anonymous_mb - imports_mb):,.0f} ({memory.anonymous_mb:,.0f})" if memory else "–"


def _row(name: str, results: dict[str, Result]) -> str:
    peer, result = ALL[name], results[name]
    resume = "none"
    if peer.sizes:
        sizes = [f"{power(size)}: {seconds:.2f}" for size, seconds in result.smaller.items()]
        sizes.append(f"{power(peer.sizes[-1])}: {_cell(name, 'resume', results, 1, 3)}")
        resume = ", ".join(sizes) + result.index
    return " | ".join(
        (
            _title(name),
            f"{_cell(name, 'warm', results, 1e-6, 1)}",
            f"{_cell(name, 'cold', results, 1e-6, 1)}",
            f"{result.workers_warm}, {result.workers_cold}",
            _cell(name, "first warm", results, 1e3, 1),
            _cell(name, "first cold", results, 1e3, 1),
            _cell(name, "from start", results, 1, 2),
            resume,
            _memory(result.reading, result.imports_mb),
            _memory(result.resuming, result.imports_mb),
            result.data,
        )
    )


def _title(name: str) -> str:
    peer = ALL[name]
    if name.startswith("ours"):
        return f"**ours**: {peer.how}"
    if not peer.package:
        return f"{name}: {peer.how}"
    return f"{name} ({peer.package} {pinned_version(peer.environment, peer.package)}): {peer.how}"


_COLUMNS = (
    "loader",
    "M tokens/s, warm",
    "M tokens/s, cold",
    "workers warm, cold",
    "first batch after opening, ms, warm",
    "ms, cold",
    "after the start of the process, s",
    "resume in the middle of so many windows, s",
    "MB more than imports (all) to read",
    "to resume",
    "an epoch holds",
)


def table(results: dict[str, Result], failed: dict[str, str]) -> str:
    """Return the table in Markdown; loaders that failed come last, with the reason."""
    lines = [f"| {' | '.join(_COLUMNS)} |", f"|{'---|' * len(_COLUMNS)}"]
    lines += [f"| {_row(name, results)} |" for name in results]
    lines += [f"| {_title(name)} | did not run: {why.replace('|', '/')} |" for name, why in failed.items()]
    return "\n".join(lines)
