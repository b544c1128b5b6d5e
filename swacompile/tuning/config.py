"""A Config: one point of a schedule rule's space. The same text stands in logs, database and command line."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from swacompile.errors import ArgumentError

_TEXT = re.compile(r"(?P<rule>[a-z][a-z0-9_]*):(?P<values>[a-z][a-z0-9_]*=\d{1,9}(,[a-z][a-z0-9_]*=\d{1,9})*)")
EXAMPLE = "cpu_tiles:queries=48,keys=96"


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Values of a rule's parameters, in the rule's order; switches are 0 or 1. `str` and `parse` are inverse."""

    rule: str
    values: tuple[tuple[str, int], ...]

    def __post_init__(self) -> None:
        names = [name for name, _ in self.values]
        if len(set(names)) != len(names) or _TEXT.fullmatch(str(self)) is None:
            raise ValueError(
                f"expected distinct lower-case names with values from 0, for example {EXAMPLE!r}, found {self}"
            )

    @classmethod
    def of(cls, rule: str, values: Mapping[str, int]) -> Self:
        return cls(rule=rule, values=tuple((name, int(value)) for name, value in values.items()))

    @classmethod
    def parse(cls, text: str) -> Self:
        """The Config that `str` wrote. Raises ArgumentError."""
        match = _TEXT.fullmatch(text)
        if match is None:
            raise ArgumentError(f"not a config: {text!r}; expected for example {EXAMPLE!r}")
        pairs = [pair.split("=") for pair in match["values"].split(",")]
        try:
            return cls(rule=match["rule"], values=tuple((name, int(value)) for name, value in pairs))
        except ValueError as error:
            raise ArgumentError(f"not a config: {text!r}; {error}") from error

    def __str__(self) -> str:
        return f"{self.rule}:" + ",".join(f"{name}={value}" for name, value in self.values)

    def as_dict(self) -> dict[str, int]:
        return dict(self.values)

    def replaced(self, changes: Mapping[str, int]) -> Self:
        """The same Config with other values for some of its names."""
        return type(self).of(self.rule, self.as_dict() | dict(changes))
