"""What one attention asks of a kernel, coarsely enough to be a tuning key: similar calls share a Workload."""

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import Self

from swacompile.errors import ArgumentError

SMALLEST_CLASS = 16


class DType(StrEnum):
    """Element types of query, key, value and output, as kernel names spell them."""

    F32 = "f32"
    F16 = "f16"
    BF16 = "bf16"

    @property
    def long_name(self) -> str:
        """As TVM and numpy spell it."""
        return {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}[self.value]

    @property
    def bytes(self) -> int:
        return 4 if self is DType.F32 else 2


class Feature(StrEnum):
    """Parts of the operator beyond a causal band, in the order in which a workload's text lists them."""

    TWO_SIDED = "two_sided"
    KEY_PADDING = "key_padding"
    SEGMENTS = "segments"
    CHUNKED = "chunked"
    SINKS = "sinks"
    BIAS = "bias"
    ALIBI = "alibi"
    SOFTCAP = "softcap"
    ZEROED = "zeroed"
    DECODE = "decode"


_PATTERN = re.compile(
    r"(?P<dtype>f32|f16|bf16)-d(?P<head_size>\d+)-v(?P<value_size>\d+)-g(?P<group>\d+)"
    r"-w(?P<window>\d+|all)-n(?P<length>\d+)(?P<features>(-[a-z_]+)*)"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """The key of the tuning database. `str` and `parse` are inverse and stable across versions.

    `group` is query heads per key/value head; `window` the keys a query sees (left + right + 1) and `length` the
    number of keys, both rounded up to a power of two; `window` is None where a side is unbounded.
    """

    dtype: DType
    head_size: int
    value_size: int
    group: int
    window: int | None
    length: int
    features: frozenset[Feature] = frozenset()

    def __post_init__(self) -> None:
        for name in ("head_size", "value_size", "group", "length"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.length != length_class(self.length) or self.window != window_class(self.window):
            raise ValueError(f"window {self.window} and length {self.length} must be classes: use Workload.of")

    @classmethod
    def of(
        cls,
        *,
        dtype: DType,
        head_size: int,
        value_size: int,
        group: int,
        window: int | None,
        length: int,
        features: frozenset[Feature] = frozenset(),
    ) -> Self:
        """The workload of a call with exactly this window and length."""
        return cls(
            dtype=dtype,
            head_size=head_size,
            value_size=value_size,
            group=group,
            window=window_class(window),
            length=length_class(length),
            features=features,
        )

    @classmethod
    def parse(cls, text: str) -> Self:
        """The workload that `str` wrote. Raises ArgumentError."""
        match = _PATTERN.fullmatch(text)
        if match is None:
            raise ArgumentError(
                f"not a workload: {text!r}; expected for example 'f32-d64-v64-g4-w512-n2048' or "
                f"'bf16-d128-v128-g8-wall-n16-decode', with features from: {', '.join(Feature)}"
            )
        names = match["features"].split("-")[1:]
        unknown = sorted(set(names) - set(Feature))
        if unknown:
            raise ArgumentError(f"unknown feature {unknown[0]!r} in {text!r}: expected one of {', '.join(Feature)}")
        return cls.of(
            dtype=DType(match["dtype"]),
            head_size=int(match["head_size"]),
            value_size=int(match["value_size"]),
            group=int(match["group"]),
            window=None if match["window"] == "all" else int(match["window"]),
            length=int(match["length"]),
            features=frozenset(Feature(name) for name in names),
        )

    def __str__(self) -> str:
        window = "all" if self.window is None else self.window
        sizes = f"{self.dtype}-d{self.head_size}-v{self.value_size}-g{self.group}-w{window}-n{self.length}"
        return "".join([sizes, *(f"-{feature}" for feature in Feature if feature in self.features)])


def window_class(window: int | None) -> int | None:
    """Window rounded up to a power of two."""
    return None if window is None else max(SMALLEST_CLASS, _power_of_two(window))


def length_class(length: int) -> int:
    """Length rounded up to a power of two."""
    return max(SMALLEST_CLASS, _power_of_two(length))


def _power_of_two(value: int) -> int:
    return 1 << (value - 1).bit_length() if value > 1 else 1
