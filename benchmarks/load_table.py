"""The loaders that peers_load.py compares, what it finds out about each, and the table of that."""

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
    """A loader of the field, or of ours."""

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
class Found:
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
    """Return a power of ten, in words."""
    return f"10^{len(str(windows)) - 1}"


def _cell(name: str, key: str, found: dict[str, Found], scale: float, digits: int) -> str:
    """Return a figure's median over rounds, and how many times better ours is."""
    mine = [figures[key] for figures in found["ours"].rounds]
    theirs = [figures[key] for figures in found[name].rounds]
    text = f"{statistics.median(theirs) * scale:,.{digits}f}"
    if name == "ours":
        return text
    better = [b / a if key not in ("warm", "cold") else a / b for a, b in zip(mine, theirs, strict=True)]
    return f"{text} ({statistics.median(better):,.1f}×)"


def _memory(memory: Memory | None, imports_mb: float) -> str:
    return f"{max(0, memory.anonymous_mb - imports_mb):,.0f} ({memory.anonymous_mb:,.0f})" if memory else "–"


def _row(name: str, found: dict[str, Found]) -> str:
    peer, told = ALL[name], found[name]
    resume = "none"
    if peer.sizes:
        sizes = [f"{power(size)}: {seconds:.2f}" for size, seconds in told.smaller.items()]
        sizes.append(f"{power(peer.sizes[-1])}: {_cell(name, 'resume', found, 1, 3)}")
        resume = ", ".join(sizes) + told.index
    return " | ".join(
        (
            _title(name),
            f"{_cell(name, 'warm', found, 1e-6, 1)}",
            f"{_cell(name, 'cold', found, 1e-6, 1)}",
            f"{told.workers_warm}, {told.workers_cold}",
            _cell(name, "first warm", found, 1e3, 1),
            _cell(name, "first cold", found, 1e3, 1),
            _cell(name, "from start", found, 1, 2),
            resume,
            _memory(told.reading, told.imports_mb),
            _memory(told.resuming, told.imports_mb),
            told.data,
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


def table(found: dict[str, Found], failed: dict[str, str]) -> str:
    """Return the table, in Markdown; those that failed come last, with the reason."""
    lines = [f"| {' | '.join(_COLUMNS)} |", f"|{'---|' * len(_COLUMNS)}"]
    lines += [f"| {_row(name, found)} |" for name in found]
    lines += [f"| {_title(name)} | did not run: {why.replace('|', '/')} |" for name, why in failed.items()]
    return "\n".join(lines)
