"""Bounds of values as part of their type: a `PositiveInt` is an int to whoever reads it, and config's fields say with
it what they may be. rules.py checks it, schema.py shows it. Infinity and NaN are within no bound. A `PathText` is a
text that file.py expands as it reads it."""

import dataclasses
import math
import re
import types
import typing
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Protocol, TypeGuard, runtime_checkable

Hint = Any  # of a type, as get_type_hints has them: a class, a union, a Literal ...


@runtime_checkable
class Section(Protocol):
    """A dataclass."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]


@dataclass(frozen=True)
class Bound:
    """Numbers above `above` and below `below`, from `at_least` to `at_most`. The words are the error's."""

    constraint: str
    above: float = -math.inf
    at_least: float = -math.inf
    at_most: float = math.inf
    below: float = math.inf
    remedy: str | None = None  # None: to raise what is too small, to lower the rest

    def allows(self, value: float) -> bool:
        return self.above < value < self.below and self.at_least <= value <= self.at_most

    def remedy_of(self, value: float) -> str:
        return self.remedy or ("raise it" if value <= self.above or value < self.at_least else "lower it")


@dataclass(frozen=True)
class Contains:
    """Texts with `part` in them."""

    part: str
    remedy: str

    @property
    def constraint(self) -> str:
        return f"must contain {self.part}"

    def allows(self, value: str) -> bool:
        return self.part in value

    def remedy_of(self, value: str) -> str:
        return self.remedy


@dataclass(frozen=True)
class Matches:
    """Texts that `pattern` matches as a whole."""

    pattern: str
    constraint: str
    remedy: str

    def allows(self, value: str) -> bool:
        return re.fullmatch(self.pattern, value) is not None

    def remedy_of(self, value: str) -> str:
        return self.remedy


class IsPath:
    """Marks texts that name a file or folder, or may: `~` and environment variables in them are expanded."""


IS_PATH = IsPath()


def is_section(hint: Hint) -> TypeGuard[type[Section]]:
    return isinstance(hint, type) and dataclasses.is_dataclass(hint)


def without_null(hint: Hint) -> tuple[Hint, bool]:
    """(X, True) of `X | None`, (X, False) of X."""
    parts = alternatives(hint)
    inner = tuple(part for part in parts if part is not types.NoneType)
    return (hint, False) if inner == parts else (typing.Union[inner], True)  # noqa: UP007


def alternatives(hint: Hint) -> tuple[Hint, ...]:
    """(X, Y) of `X | Y`, (X,) of X."""
    return typing.get_args(hint) if typing.get_origin(hint) in (types.UnionType, typing.Union) else (hint,)


def item_section(hint: Hint) -> type[Section] | None:
    """The dataclass S of `tuple[S, ...]`, also as one of several alternatives; None of what is no such list."""
    lists = (typing.get_args(part)[0] for part in alternatives(hint) if typing.get_origin(part) is tuple)
    return next(filter(is_section, lists), None)


def plain(hint: Hint) -> Hint:
    """int of Annotated[int, ...], and of int."""
    return typing.get_args(hint)[0] if typing.get_origin(hint) is Annotated else hint


def is_path(hint: Hint) -> bool:
    """Of `X | Y` whether one of them is."""
    return any(IS_PATH in getattr(part, "__metadata__", ()) for part in alternatives(hint))


def bounds_of(hint: Hint) -> tuple[Bound | Contains | Matches, ...]:
    """Those of a type: of `X | None` those of X, of a tuple those of each item."""
    if isinstance(hint, (Bound, Contains, Matches)):
        return (hint,)
    return tuple(bound for part in typing.get_args(hint) for bound in bounds_of(part))


POSITIVE = Bound("must be greater than 0", above=0)
NOT_NEGATIVE = Bound("must be 0 or more", at_least=0)
FRACTION = Bound("must be between 0 and 1", at_least=0, at_most=1)

PositiveInt = Annotated[int, POSITIVE]
PositiveFloat = Annotated[float, POSITIVE]
NonNegativeInt = Annotated[int, NOT_NEGATIVE]
NonNegativeFloat = Annotated[float, NOT_NEGATIVE]
Fraction = Annotated[float, FRACTION]
PositiveFraction = Annotated[float, POSITIVE, FRACTION]
NonNegativeFraction = Annotated[float, NOT_NEGATIVE, FRACTION]  # as Fraction, in the words of a coefficient

Decay = Annotated[
    float, Bound("must be between 0 and 1, and not 1: a mean that decays by nothing never begins", at_least=0, below=1)
]
LearningRate = Annotated[float, POSITIVE, Bound("must be at most 1: a step moves a weight by about as much", at_most=1)]
Multiple = Annotated[float, NOT_NEGATIVE, Bound("must be at most 1000", at_most=1000)]
Seconds = Annotated[
    float, POSITIVE, Bound("must be at most 2000000, 23 days: no socket waits longer", at_most=2_000_000)
]
Threads = Annotated[int, POSITIVE, Bound("must be at most 1024, more than a machine has cores", at_most=1024)]
Count = Annotated[int, POSITIVE, Bound("must be at most 1000000", at_most=1_000_000)]
Steps = Annotated[int, POSITIVE, Bound("must be at most 999999: step folders have six digits", at_most=999_999)]
Samples = Annotated[int, POSITIVE, Bound("must be at most 16384, as vLLM's n", at_most=16384)]
# vLLM samples at 0.01 where less is asked for, and refuses more than 2.
Temperature = Annotated[
    float, POSITIVE, Bound("must be between 0.01 and 2: vLLM samples at no other", at_least=0.01, at_most=2)
]
TemperatureOrGreedy = Annotated[
    float, Bound("must be 0, which is greedy, or between 0.01 and 2: vLLM samples at no other", at_least=0, at_most=2)
]
PathText = Annotated[str, IS_PATH]
Scalars = dict[str, bool | int | float | str | None]  # a mapping of names that the configuration does not know

Seed = Annotated[int, Bound("must be between 0 and 4294967295, as NumPy's seeds are", at_least=0, at_most=2**32 - 1)]
GroupSize = Annotated[
    int,
    POSITIVE,
    Bound("a group needs 2 responses to compare", at_least=2, remedy="set it to 2 or more"),
    Bound("must be at most 16384, as vLLM's n", at_most=16384),
]
Draws = Annotated[
    float,
    POSITIVE,
    Bound("must be 1 or more: a step needs prompts_per_step prompts", at_least=1),
    Bound("must be at most 1000", at_most=1000),
]
ImportanceCap = Annotated[float, Bound("must be 1 or more: at weight 1 there is nothing to correct", at_least=1)]
DualClip = Annotated[
    float, Bound("must be more than 1, the ratio on policy", above=1, remedy="raise it, or set it to null")
]
ExpertParallel = Annotated[
    int,
    POSITIVE,
    Bound("expert parallelism is not built: the model families here are dense", at_most=1, remedy="leave it at 1"),
]
METRIC_NAME = Matches(r"[\w.@-]+", "must be of letters, digits, '_', '.', '@' and '-'", remedy="write such a name")
MetricName = Annotated[str, METRIC_NAME]
WithGroup = Annotated[str, Contains("(", remedy="put the part that is the answer in parentheses, as '#### (.+)'")]
Template = Annotated[str, Contains("{problem}", remedy="add it where the problem goes")]
