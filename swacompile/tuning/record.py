"""One measurement as a line of JSON, and back again with every field checked.

Reading a line never executes anything.
"""

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from datetime import datetime
from enum import StrEnum
from typing import Any, Self

from swacompile.errors import SwacompileError
from swacompile.tuning.config import Config
from swacompile.workload import Workload

SCHEMA = 1
MAX_LINE = 4096
"""Longest line in bytes: written in one piece, and a reader need not hold more."""
MAX_TEXT = 500
_NAME = re.compile(r"[A-Za-z0-9_]{1,64}")


class Status(StrEnum):
    """What became of a candidate. Only OK ones are ever chosen."""

    OK = "ok"
    BUILD_FAILED = "build-failed"
    WRONG = "wrong"
    CRASHED = "crashed"
    HUNG = "hung"


class Origin(StrEnum):
    """Why a candidate was measured."""

    DEFAULT = "default"
    SEARCH = "search"


class BadRecord(ValueError):
    """A line is no record of this schema; the message says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance:
    """Where a time comes from. Times are compared only where device, threads and revision agree.

    `driver` is the GPU driver's version, None on a CPU; `revision` names the kernel sources; `versions` is "package
    version, ...".
    """

    device: str
    threads: int
    revision: str
    versions: str
    driver: str | None = None

    @property
    def setting(self) -> tuple[str, int, str]:
        """What two times must have in common to stand side by side."""
        return self.device, self.threads, self.revision

    def comparable(self, other: "Provenance") -> bool:
        return self.setting == other.setting


@dataclass(frozen=True, slots=True, kw_only=True)
class TuningRecord:
    """A candidate's outcome. `median_us` is microseconds a call, `spread` the interquartile range over the median.

    Both are None unless `status` is OK. `rung` counts the rounds of successive halving: a higher one measured longer.
    """

    target: str
    workload: Workload
    config: Config
    status: Status
    origin: Origin
    rung: int
    samples: int
    median_us: float | None
    spread: float | None
    provenance: Provenance
    date: str
    message: str = ""

    def __post_init__(self) -> None:
        timed = self.median_us is not None and self.spread is not None and self.samples > 0
        if (self.status is Status.OK) != timed:
            raise ValueError(
                f"a record has times if and only if its status is ok, found {self.status} with {self.median_us}"
            )
        if timed and not (
            math.isfinite(self.median_us or 0) and (self.median_us or 0) > 0 and 0 <= (self.spread or 0) < math.inf
        ):
            raise ValueError(
                f"median_us must be positive and spread at least 0, found {self.median_us} and {self.spread}"
            )

    def line(self) -> str:
        """The record as one line of JSON, without the line break."""
        document = {field.name: getattr(self, field.name) for field in fields(self)}
        origin = document.pop("provenance")
        document |= {field.name: getattr(origin, field.name) for field in fields(origin)}
        document["workload"], document["config"] = str(self.workload), str(self.config)
        document["message"] = self.message[:MAX_TEXT]
        return json.dumps({"schema": SCHEMA} | document, allow_nan=False)

    @classmethod
    def parse(cls, line: str) -> Self:
        """The record that `line` wrote. Raises BadRecord."""
        document = _read_object(line)
        if document.get("schema") != SCHEMA:
            raise BadRecord(f"expected schema {SCHEMA}, found {document.get('schema')!r}")
        if set(document) != set(_READERS) | {"schema"}:
            wrong = sorted(set(document) ^ (set(_READERS) | {"schema"}))
            raise BadRecord(f"missing or unknown fields: {', '.join(wrong)[:MAX_TEXT]}")
        values = {name: _field(name, document[name]) for name in _READERS}
        origin = {field.name: values.pop(field.name) for field in fields(Provenance)}
        try:
            return cls(**values, provenance=Provenance(**origin))
        except ValueError as error:
            raise BadRecord(str(error)) from error


def _read_object(line: str) -> Mapping[str, Any]:
    if len(line.encode(errors="replace")) > MAX_LINE:
        raise BadRecord(f"longer than {MAX_LINE} bytes")
    try:
        document = json.loads(line, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise BadRecord(f"not JSON: {error}") from error
    if not isinstance(document, dict):
        raise BadRecord(f"expected a JSON object, found {type(document).__name__}")
    return document


def _no_constant(name: str) -> float:
    raise ValueError(f"{name} is not a number here")


def _field(name: str, value: Any) -> Any:
    try:
        return _READERS[name](value)
    except (SwacompileError, ValueError, TypeError) as error:
        raise BadRecord(f"{name}: {error}") from error


def _text(value: Any) -> str:
    if not isinstance(value, str) or len(value) > MAX_TEXT or not value.isprintable():
        raise ValueError(f"expected a printable text of at most {MAX_TEXT} characters, found {str(value)[:80]!r}")
    return value


def _name(value: Any) -> str:
    if _NAME.fullmatch(_text(value)) is None:
        raise ValueError(f"expected an identifier, found {value[:80]!r}")
    return str(value)


def _count(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**31:
        raise ValueError(f"expected an integer from 0, found {str(value)[:80]!r}")
    return value


def _number(value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"expected a number, found {str(value)[:80]!r}")
    return float(value)


def _date(value: Any) -> str:
    datetime.strptime(_text(value), "%Y-%m-%dT%H:%M:%SZ")
    return str(value)


_READERS: Mapping[str, Callable[[Any], Any]] = {
    "target": _name,
    "workload": lambda value: Workload.parse(_text(value)),
    "config": lambda value: Config.parse(_text(value)),
    "status": lambda value: Status(_text(value)),
    "origin": lambda value: Origin(_text(value)),
    "rung": _count,
    "samples": _count,
    "median_us": _number,
    "spread": _number,
    "device": _text,
    "threads": _count,
    "revision": _name,
    "versions": _text,
    "driver": lambda value: None if value is None else _text(value),
    "date": _date,
    "message": _text,
}
