"""What a resume may do with an option, and what an old run did that knew nothing of it: both stand in the option's annotation.

    micro_batch: Annotated[int, "Windows that go through the model at once.", Resume.UNLESS_BALANCED] = 32
    tf32: Annotated[bool, "Let a GPU compute float32 matrix products in TF32.", Before(False)] = True

An option without a policy needs `allow_change`, which is always safe: nobody changes it by accident, and whoever does finds the change
in the run's record. A run that was begun before there was such an option did what its default does, unless `Before` says otherwise.
"""

import enum
from dataclasses import MISSING, dataclass
from typing import Any, get_args

from minimind_data.options import leaves


class Resume(enum.Enum):
    """What becomes of an option that the user writes beside `resume`."""

    ALLOWED = "it decides the result, so a change needs `allow_change` and is noted in the record"
    FREE = "it cannot change the result and is taken over"
    UNLESS_BALANCED = "as FREE, but as ALLOWED where experts are balanced over the micro-batch"
    TRAINING = (
        "as ALLOWED; of a model, it says how it is trained, and so is no property of weights to begin from"
    )
    END = "as ALLOWED; it says when the run ends, in place of every other one that does"
    SHAPE = "it decides the shape of the weights and never changes"
    ORIGIN = "where the weights lie that the run began from: it may change, they may not"
    ACTION = "it is done once, because it is asked for"
    DERIVED = "the run sets it, never the user"
    UNRECORDED = "the record leaves it out: a run is where it is, also when its folder has been moved"


@dataclass(frozen=True)
class Before:
    """What a run does whose record is older than the option."""

    value: Any


@dataclass(frozen=True)
class Policy:
    """What `Annotated` says of one option, or what holds where it says nothing."""

    resume: Resume
    before: Any
    """What a run did whose record does not have the option."""


def policies(kind: type) -> dict[str, Policy]:
    """Return the policy of every option of a dataclass, by its flat name."""
    return {
        name: _policy(get_args(annotation)[1:], default)
        for name, annotation, default in leaves(kind, flags_only=False)
    }


def names_of(kind: type, *resume: Resume) -> frozenset[str]:
    """Return the flat names of the options of a dataclass that have one of these policies."""
    return frozenset(name for name, policy in policies(kind).items() if policy.resume in resume)


def _policy(extras: tuple[Any, ...], default: Any) -> Policy:
    resume = next((extra for extra in extras if isinstance(extra, Resume)), Resume.ALLOWED)
    before = next((extra.value for extra in extras if isinstance(extra, Before)), default)
    assert before is not MISSING, (
        "an option needs a default, or `Before`, to be read from records that do not have it"
    )
    return Policy(resume, before)
