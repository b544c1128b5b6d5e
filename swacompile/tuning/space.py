"""The space of a schedule rule's Configs, and what a rule must offer to be tuned."""

import itertools
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from swacompile.target import Target
from swacompile.tuning.config import Config
from swacompile.workload import Workload

ATTEMPTS = 5000
"""Draws after which sampling gives up looking for a point that is new and possible: one in 300 may be."""
MOST_LISTED = 200_000
"""Points of a space that is gone through one by one where that is needed: seconds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """One axis: its values in an order in which neighbours behave alike."""

    name: str
    values: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.values or len(set(self.values)) != len(self.values):
            raise ValueError(f"parameter {self.name} needs distinct values, found {self.values}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Space:
    """All Configs that are tried for one workload on one target: `base` with other values for `parameters`.

    `refusal` says why a Config cannot be built within the target's limits, or None where it can; what it refuses is
    never built.
    """

    base: Config
    parameters: tuple[Parameter, ...]
    refusal: Callable[[Config], str | None]

    @property
    def points(self) -> int:
        """Number of combinations, possible or not."""
        return math.prod(len(parameter.values) for parameter in self.parameters)

    def __str__(self) -> str:
        """Rule, parameters and their values."""
        axes = (f"{axis.name}={'|'.join(map(str, axis.values))}" for axis in self.parameters)
        return f"{self.base.rule}:{','.join(axes)}"

    def possible(self) -> tuple[int, bool]:
        """How many combinations can be built, and whether that is exact: of a large space a sample tells."""
        if self.points <= MOST_LISTED:
            return sum(1 for _ in self), True
        rng = random.Random(0)
        found = sum(self.refusal(self._drawn(rng)) is None for _ in range(ATTEMPTS))
        return round(self.points * found / ATTEMPTS), False

    def __iter__(self) -> Iterator[Config]:
        """Every possible Config."""
        names = [parameter.name for parameter in self.parameters]
        for values in itertools.product(*(parameter.values for parameter in self.parameters)):
            config = self.base.replaced(dict(zip(names, values, strict=True)))
            if self.refusal(config) is None:
                yield config

    def sample(self, rng: random.Random, seen: set[Config]) -> Config | None:
        """A possible Config not in `seen`; None where none is left or none was found."""
        for _ in range(ATTEMPTS):
            config = self._drawn(rng)
            if config not in seen and self.refusal(config) is None:
                return config
        rest = self if self.points <= MOST_LISTED else ()
        return next((config for config in rest if config not in seen), None)

    def _drawn(self, rng: random.Random) -> Config:
        return self.base.replaced({parameter.name: rng.choice(parameter.values) for parameter in self.parameters})

    def neighbours(self, config: Config) -> Iterator[Config]:
        """Possible Configs one step away along one axis, or along two at once: limits often couple two axes."""
        steps = [self._steps(config, parameter) for parameter in self.parameters]
        single = [{name: value} for axis in steps for name, value in axis]
        double = [dict(pair) for a, b in itertools.combinations(steps, 2) for pair in itertools.product(a, b)]
        for changes in (*single, *double):
            candidate = config.replaced(changes)
            if self.refusal(candidate) is None:
                yield candidate

    @staticmethod
    def _steps(config: Config, parameter: Parameter) -> list[tuple[str, int]]:
        """The next smaller and larger values; the parameter's own where the Config's value is none of them."""
        value = config.as_dict()[parameter.name]
        if value not in parameter.values:
            return [(parameter.name, other) for other in parameter.values]
        place = parameter.values.index(value)
        return [(parameter.name, parameter.values[i]) for i in (place - 1, place + 1) if 0 <= i < len(parameter.values)]


class TunableRule(Protocol):
    """A schedule rule as the tuner sees it. One object a family of kernels."""

    @property
    def name(self) -> str:
        """First word of its Configs."""

    def applies(self, workload: Workload, target: Target) -> bool:
        """Whether this rule has kernels for the workload on the target."""

    def default(self, workload: Workload, target: Target) -> Config:
        """The Config chosen by an analytical model: at once, without building or measuring."""

    def space(self, workload: Workload, target: Target) -> Space:
        """What may be tried. Its `refusal` accepts the default."""

    def completed(self, config: Config) -> Config | None:
        """A Config of earlier kernel sources as one of today's: parameters that it lacks take the value under which the
        kernel is as it was before them. None where that cannot be said.
        """

    def function_name(self, workload: Workload, target: Target) -> str:
        """The function in a built library."""

    def build(self, workload: Workload, config: Config, target: Target, library: Path) -> None:
        """Write the kernel as a shared library. May take seconds, fail, crash or hang.

        The tuner calls it in a process of its own.
        """

    def revision(self) -> str:
        """Changes whenever the rule's sources do: times measured with other sources are not compared."""
