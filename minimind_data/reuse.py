"""Which splits of a build need not be made again: those whose input has not changed and whose shards are there.

Shards are looked at by their sizes alone; `verify` reads them. What a finished dataset says of its shards is in `previous.py`, what an unfinished
build has written in `work.py`.
"""

from collections.abc import Sequence
from dataclasses import replace

from minimind_data.format import InputEntry
from minimind_data.plan import TokenizeOptions
from minimind_data.previous import Previous, is_there
from minimind_data.records import content_of
from minimind_data.reporting import Announce
from minimind_data.split import SplitResult, SplitTask
from minimind_data.work import WorkFolder


def reusable(
    work: WorkFolder,
    tasks: Sequence[SplitTask],
    options: TokenizeOptions,
    previous: Previous | None,
    *,
    previous_inputs: Sequence[InputEntry],
    announce: Announce,
) -> tuple[dict[str, SplitResult], set[str]]:
    """Find the results that still hold, of an interrupted build and of a finished dataset.

    Args:
        work: the folder of the build.
        tasks: all splits, with their duplicates where these are looked for.
        options: of the build.
        previous: the finished dataset, if there is one.
        previous_inputs: the inputs as they are now, where there is one.
        announce: told of inputs that changed.

    Returns:
        (results by the names of their splits, names of the finished dataset's shards that do not hold).
    """
    kept: dict[str, SplitResult] = {}
    changed = previous.names - {task.name for task in tasks} if previous else set()
    announced: set[str] = set()
    for task in tasks:
        result, is_new = _result_of(work, task, options, previous)
        if result is None:
            continue
        here = [entry.sha256 for entry in previous_inputs[task.input : task.input + result.inputs]]
        is_untouched = previous is not None and not is_new and here == previous.input_sha256(result)
        if result.duplicates_sha256 != task.duplicates_sha256 or not (
            is_untouched or _is_content_of(task, result, options)
        ):
            if previous is not None and task.name in previous.names:
                changed.add(task.name)
            if task.split.path not in announced:
                announce(f"{task.split.path}: changed since {task.name} was made; such splits are made again")
                announced.add(task.split.path)
        elif is_there(work.out, task.name, result.shard) and is_there(work.val, task.name, result.val_shard):
            kept[task.name] = replace(result, input=task.input)
    return kept, changed


def _result_of(
    work: WorkFolder, task: SplitTask, options: TokenizeOptions, previous: Previous | None
) -> tuple[SplitResult | None, bool]:
    """Return (what the split gave, whether in the build that is under way); its bad records may not be wanted any more."""
    result = work.read_result(task.name)
    if result is not None and not (result.set_aside and options.on_bad_record == "stop"):
        return result, True
    return (previous.result_of(task.name) if previous else None), False


def _is_content_of(task: SplitTask, result: SplitResult, options: TokenizeOptions) -> bool:
    found = content_of(task.split, options.records, options.kind)
    return found == (result.input_start, result.input_stop, result.input_sha256)
