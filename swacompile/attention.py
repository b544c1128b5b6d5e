"""One attention of a model, normalised, and what is known of its mask."""

from dataclasses import dataclass
from enum import StrEnum

from swacompile.band import Alignment, BandMask
from swacompile.index_expr import TRUE, Expr


class Layout(StrEnum):
    """Order of a 4-D tensor's axes: batch, heads, sequence, head size."""

    BHSD = "BHSD"
    BSHD = "BSHD"


class Kind(StrEnum):
    """What a mask lets a query see. Only SLIDING, FULL and ZEROED have a kernel; the others are reported."""

    FULL = "full"
    SLIDING = "sliding"
    CHUNKED = "chunked"
    ZEROED = "zeroed"
    PREFIX = "prefix"
    GLOBAL_PLUS_BAND = "global_plus_band"
    DILATED = "dilated"
    UNKNOWN = "unknown"


class MaskedRows(StrEnum):
    """What the source model gives for a query that sees no key."""

    ZERO = "zero"
    UNIFORM = "uniform"
    NAN = "nan"


@dataclass(frozen=True, slots=True, kw_only=True)
class Axes:
    """The symbols that a mask formula is written in: indices of batch, head, query and key.

    `given` is a condition on sizes without which the model does not run: two axes that meet in one operation are equal.
    """

    batch: Expr
    head: Expr
    query: Expr
    key: Expr
    given: Expr = TRUE

    @property
    def queries(self) -> Expr:
        """Number of queries S."""
        return self.query.args[0]

    @property
    def keys(self) -> Expr:
        """Number of keys T."""
        return self.key.args[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class Operand:
    """A 4-D value of the source model and the order of its axes.

    Where `flat` it is 3-D, BSHD with heads and head size in one axis; where `merged_heads` is not 0 it is 3-D, with the batch and that
    many heads in one axis: (B*H,S,D) as BHSD, (S,B*H,D) as BSHD.
    """

    value: str
    layout: Layout
    flat: bool = False
    merged_heads: int = 0

    @property
    def merged(self) -> bool:
        return self.merged_heads > 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """One attention site. Value names are the source model's; query (B,H,S,D), key (B,K,T,D), value (B,K,T,V) in their operands' layouts.

    `visible` is the condition under which a query sees a key, `zeroed` the condition under which a score is multiplied by zero (FALSE
    where it never is). `output` is (B,H,S,V) in `output_layout`, (B*H,S,V) where `merged_output`, (B,S,H*V) where `flat_output`. `sinks` names a value of shape (H,), or holds the one
    number that all heads share. `mask_form` says how the mask is applied, for people. `bias` is what is added to visible scores (a formula
    on the axes), None for nothing.
    """

    node: str
    form: str
    mask_form: str
    query: Operand
    key: Operand
    value: Operand
    output: str
    merged_output: bool
    axes: Axes
    visible: Expr
    zeroed: Expr
    heads: int
    kv_heads: int
    head_size: int | None
    value_head_size: int | None
    dtype: str
    scale: float
    softcap: float | None
    sinks: str | float | None
    masked_rows: MaskedRows
    assumptions: tuple[str, ...]
    bias: Expr | None = None
    output_layout: Layout = Layout.BHSD
    flat_output: bool = False


class ResidualKind(StrEnum):
    """Factors of a mask beside the band that become operands."""

    KEY_PADDING = "key_padding"
    SEGMENTS = "segments"
    BIAS = "bias"
    ALIBI = "alibi"
    OFFSET = "offset"


@dataclass(frozen=True, slots=True, kw_only=True)
class Residual:
    """A run-time factor of the mask: a condition on (batch, key), or equality of a per-position label.

    `condition` is the factor as it stands in the mask; `data` is the formula of the operand's element: a boolean at (batch, key) for
    KEY_PADDING, an integer at (batch, key) for SEGMENTS. Of the additive kinds the condition is TRUE and the data a real number: at
    (batch, head, query, key) for BIAS, the slope at (head) for ALIBI. OFFSET holds one integer, the place of query 0 among the keys, from
    which the band counts in place of its alignment. `alignment` is where query 0 stands for a label, None where that does not matter.
    """

    kind: ResidualKind
    condition: Expr
    data: Expr
    alignment: Alignment | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What a proof is limited to: no size above `largest`; where `needs_keys_for_queries`, no more queries than keys; the values named in
    `zero_or_one` hold no other numbers."""

    largest: int | None = None
    needs_keys_for_queries: bool = False
    zero_or_one: tuple[str, ...] = ()

    @property
    def words(self) -> tuple[str, ...]:
        largest = () if self.largest is None else (f"sizes <= {self.largest}",)
        keys = ("keys >= queries",) if self.needs_keys_for_queries else ()
        return (*largest, *keys, *(f"{value} in {{0, 1}}" for value in self.zero_or_one))


@dataclass(frozen=True, slots=True, kw_only=True)
class BandProof:
    """A proven statement: for all sizes allowed by `valid_for`, visible <=> band and every residual. Only prove_band makes one.

    `limits` are those of `valid_for` that the proof itself needs; the others are what the model fixes or needs to run.
    """

    mask: BandMask
    residuals: tuple[Residual, ...]
    kind: Kind
    method: str
    valid_for: tuple[str, ...]
    limits: Limits = Limits()


@dataclass(frozen=True, slots=True, kw_only=True)
class Witness:
    """A cell where mask and claim differ, at these sizes."""

    batch: int
    head: int
    query: int
    key: int
    sizes: tuple[tuple[str, int], ...]
    mask_shows: bool

    def __str__(self) -> str:
        sizes = ", ".join(f"{name}={value}" for name, value in self.sizes)
        verb = "shows" if self.mask_shows else "hides"
        return f"query {self.query}, key {self.key}" + (f" ({sizes})" if sizes else "") + f": the mask {verb} it"


@dataclass(frozen=True, slots=True, kw_only=True)
class Refutation:
    """Why an attention is left as it is. `reason` starts with a stable code, then says what was expected and found."""

    code: str
    reason: str
    node: str
    kind: Kind = Kind.UNKNOWN
    band: BandMask | None = None
    witness: Witness | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One row of a report: an attention (None where its form could not be read) and the verdict on it."""

    node: str
    attention: Attention | None
    verdict: BandProof | Refutation
