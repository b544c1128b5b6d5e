"""Hold a verdict against the mask's cells, which onnx's reference evaluator computes."""

import re
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from swacompile.attention import BandProof, Refutation, Residual, ResidualKind
from swacompile.band import Alignment, BandMask
from swacompile.index_expr import Op, walk
from swacompile.passes.evaluate import evaluate
from tests.passes.grammar import Case
from tests.passes.masks import band_cells, verdict_on

FAILS_TO_RUN = (IndexError, ValueError)  # what the evaluator raises where a mutated model has no result at some sizes
WITH_WITNESS = ("not-a-band", "chunked", "dilated", "prefix", "global-plus-band", "differs", "overflow")
MOST_CELLS = 4_000_000
SIZES = ((1, 1), (1, 2), (2, 1), (3, 8), (8, 3), (7, 7), (13, 12))


class Judgement(StrEnum):
    PROVEN = "proven"
    REFUSED = "refused"
    FALSE_PROOF = "false proof"
    OTHER_BAND = "another band"
    FALSE_WITNESS = "false witness"
    NO_WITNESS = "no witness"


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    judgement: Judgement
    verdict: BandProof | Refutation


def judge(case: Case) -> Judged:
    verdict = verdict_on(case.model)
    return Judged(
        judgement=_proof(case, verdict) if isinstance(verdict, BandProof) else _refutation(case, verdict),
        verdict=verdict,
    )


def _proof(case: Case, proof: BandProof) -> Judgement:
    kinds = {residual.kind for residual in proof.residuals}
    if not kinds <= {ResidualKind.KEY_PADDING} or (case.band is not None and bool(kinds) != case.padded):
        return Judgement.FALSE_PROOF
    if not agrees(case, proof):
        return Judgement.FALSE_PROOF
    if case.band is not None and not _same(case, proof.mask):
        return Judgement.OTHER_BAND
    return Judgement.PROVEN


def agrees(case: Case, proof: BandProof) -> bool:
    """Whether the mask has the cells that the proof says, at small sizes and such as just show the band's edges."""
    guarded = "keys >= queries" in proof.valid_for
    sizes = [(queries, keys) for queries, keys in _sizes(case, proof.mask) if keys >= queries or not guarded]
    return all(_agrees(case, proof, *pair) for pair in sizes)


def _sizes(case: Case, band: BandMask) -> list[tuple[int, int]]:
    """Small sizes that the model takes, and such as just show the band's edges."""
    queries, keys = case.model.queries, case.model.keys
    edges = [abs(bound) for bound in (band.left, band.right) if bound is not None and abs(bound) < 1200]
    sizes = [
        *SIZES,
        *((edge + 2, edge + 3) for edge in edges),
        *((2, edge + 4) for edge in edges),
        *((edge + 4, 2) for edge in edges),
    ]
    fixed = ((int(queries) if queries.isdigit() else s, int(keys) if keys.isdigit() else t) for s, t in sizes)
    return list(dict.fromkeys((s, s) if keys == queries else (s, t) for s, t in fixed))


def _agrees(case: Case, proof: BandProof, queries: int, keys: int) -> bool:
    cells = _cells(case, queries, keys)
    if cells is None:
        return True
    expected = np.broadcast_to(band_cells(proof.mask, queries, keys), cells.shape)
    for residual in proof.residuals:
        expected = expected & _operand(case, residual, queries, keys)[:, None, None, :]
    return np.array_equal(cells, expected)


def _operand(case: Case, residual: Residual, queries: int, keys: int) -> np.ndarray:
    """The residual's condition as booleans (batch, keys), its data read from the evaluated model."""
    values = case.model.values(queries, keys, batch=2, **_padding(case, keys))
    numbers = {"b": np.arange(2)[:, None], "k": np.arange(keys)[None, :]}
    symbols = {node: numbers[node.name] for node in walk(residual.condition) if node.op is Op.SYMBOL and node.args}
    shown = evaluate(residual.condition, symbols, lambda node, args: values[node.name][tuple(args)])  # type: ignore[arg-type]
    return np.broadcast_to(np.asarray(shown), (2, keys))


def _cells(case: Case, queries: int, keys: int) -> np.ndarray | None:
    """The mask's cells for two batches, None where the model does not run at these sizes."""
    try:
        return case.model.cells(queries, keys, batch=2, **_padding(case, keys))
    except FAILS_TO_RUN:
        return None


def _padding(case: Case, keys: int) -> dict[str, np.ndarray]:
    return {"pad": np.random.default_rng(keys).integers(0, 2, (2, keys)).astype(bool)} if case.padded else {}


def _same(case: Case, found: BandMask) -> bool:
    """Whether the band found is the one that was written down, or cannot be told from it at the model's sizes."""
    band = case.band
    assert band is not None
    queries, keys = case.model.queries, case.model.keys
    if queries.isdigit():
        return keys.isdigit() or _same_for_last_query(band, found)
    aligned = band.alignment is found.alignment or queries == keys or (band.left is None and band.right is None)
    return (band.left, band.right) == (found.left, found.right) and aligned


def _same_for_last_query(band: BandMask, found: BandMask) -> bool:
    return all(np.array_equal(band_cells(band, 1, keys), band_cells(found, 1, keys)) for keys in (1, 2, 3, 70, 1100))


def _refutation(case: Case, refutation: Refutation) -> Judgement:
    if case.band is not None:
        return Judgement.REFUSED
    if refutation.code == "all-hidden":
        found = (_cells(case, *sizes) for sizes in _sizes(case, BandMask(left=0, right=0)))
        return (
            Judgement.FALSE_WITNESS if any(cells is not None and cells.any() for cells in found) else Judgement.REFUSED
        )
    witness, band = refutation.witness, refutation.band or _nearest(refutation.reason)
    if witness is None:
        return Judgement.NO_WITNESS if refutation.code in WITH_WITNESS else Judgement.REFUSED
    sizes = dict(witness.sizes)
    queries, keys = (int(name) if name.isdigit() else sizes[name] for name in (case.model.queries, case.model.keys))
    if queries * keys > MOST_CELLS or case.padded:
        return Judgement.REFUSED
    try:
        cells = case.model.cells(queries, keys, batch=witness.batch + 1)
    except FAILS_TO_RUN:
        return Judgement.REFUSED
    shown = bool(cells[witness.batch, witness.head, witness.query, witness.key])
    claimed = band.shows(witness.query, witness.key, queries=queries, keys=keys) if band else not shown
    return Judgement.REFUSED if shown == witness.mask_shows and shown != claimed else Judgement.FALSE_WITNESS


def _nearest(reason: str) -> BandMask | None:
    found = re.search(r"nearest band is \((\S+), (\S+)\)( bottom-right)?", reason)
    if found is None:
        return None
    left, right = (None if side == "unbounded" else int(side) for side in found.groups()[:2])
    return BandMask(left=left, right=right, alignment=Alignment.BOTTOM_RIGHT if found.group(3) else Alignment.TOP_LEFT)
