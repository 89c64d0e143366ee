"""Training small language models on datasets of `minimind_data`, which never imports this package.

    position --> sample --> batch --> step --> checkpoint --> text, weights elsewhere
    order        order      batches   training  run_folder    generation, weights

A position counts samples since the run began. It is all that a run stores of its way through the data: `order` turns it into samples by
arithmetic, so a run goes on from it at once and on any number of devices. `model` and `objectives` are what a step computes, `parallel` is
who computes it, and `run` puts all of it together: options, beginning and resuming. `integrations` is the same order in other loops.

    from minimind_train import PretrainOptions, begin, open_run, resume

    begin(PretrainOptions.of(shards="data/mine", run="runs/first", steps=100, save_every=50))
    resume("runs/first", {"steps": 200}, allow_change={"steps"})
    print(*open_run("runs/first").complete("The sky is"), sep="")

The names of `__all__` are the public ones. Each is imported when it is asked for; most of them need torch, which takes seconds.
"""

from typing import TYPE_CHECKING

from minimind_data.lazy_names import importing, module_of_each

if TYPE_CHECKING:
    from minimind_train.batches.torch_loader import ResumableBatchSampler, WindowDataset
    from minimind_train.generation.chat_session import ChatSession
    from minimind_train.generation.completion import complete
    from minimind_train.generation.options import GenerateOptions
    from minimind_train.order.mixture import MixtureOrder
    from minimind_train.order.sample_order import SampleOrder
    from minimind_train.order.skips import Skips
    from minimind_train.run.entry import begin, begin_or_resume, resume
    from minimind_train.run.evaluation import evaluate
    from minimind_train.run.location import locate
    from minimind_train.run.opening import OpenRun, open_run
    from minimind_train.run.options import DpoOptions, PretrainOptions, SftOptions
    from minimind_train.weights.exporting import export

__all__ = [
    "ChatSession",
    "DpoOptions",
    "GenerateOptions",
    "MixtureOrder",
    "OpenRun",
    "PretrainOptions",
    "ResumableBatchSampler",
    "SampleOrder",
    "SftOptions",
    "Skips",
    "WindowDataset",
    "begin",
    "begin_or_resume",
    "complete",
    "evaluate",
    "export",
    "locate",
    "open_run",
    "resume",
]

_MODULES = {
    "batches.torch_loader": ("ResumableBatchSampler", "WindowDataset"),
    "generation.chat_session": ("ChatSession",),
    "generation.completion": ("complete",),
    "generation.options": ("GenerateOptions",),
    "order.mixture": ("MixtureOrder",),
    "order.sample_order": ("SampleOrder",),
    "order.skips": ("Skips",),
    "run.entry": ("begin", "begin_or_resume", "resume"),
    "run.evaluation": ("evaluate",),
    "run.location": ("locate",),
    "run.opening": ("OpenRun", "open_run"),
    "run.options": ("DpoOptions", "PretrainOptions", "SftOptions"),
    "weights.exporting": ("export",),
}
_MODULE_OF = module_of_each(__name__, _MODULES)

if not TYPE_CHECKING:  # a type checker knows the names by their imports, and that there are no others
    __getattr__ = importing(__name__, _MODULE_OF)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
