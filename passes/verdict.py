"""What was found of a mask, apart from the attention that it belongs to."""

from dataclasses import dataclass, field

from swacompile.attention import Kind, Limits, Residual, Witness
from swacompile.band import BandMask


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """A proven mask where `code` is empty; else a refusal, in which `mask` is the band that comes nearest."""

    mask: BandMask | None = None
    residuals: tuple[Residual, ...] = ()
    method: str = ""
    valid_for: tuple[str, ...] = ()
    limits: Limits = field(default_factory=Limits)
    code: str = ""
    reason: str = ""
    kind: Kind = Kind.UNKNOWN
    witness: Witness | None = None
