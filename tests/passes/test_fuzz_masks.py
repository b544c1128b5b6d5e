"""Random masks: true bands are proven with exactly their band, spoilt ones never, and witnesses are true.

The mask's cells are computed by onnx's reference evaluator, not by formulas of our own. `python -m tests.passes.fuzz N` is the long run.
"""

import random

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from swacompile.attention import BandProof
from swacompile.band import Alignment
from tests.passes.grammar import Case, Draw, array_case, mutant, true_case
from tests.passes.judge import Judgement, judge
from tests.passes.kinds import kind_case

ACCEPTED = (Judgement.PROVEN, Judgement.REFUSED)


def cases(count: int):  # type: ignore[no-untyped-def]
    """The settings of a test of so many random cases."""
    quiet = settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck))

    def decorate(test):  # type: ignore[no-untyped-def]
        return quiet(given(source=st.randoms(use_true_random=False))(test))

    return decorate


def text_of(case: Case) -> str:
    return f"{case}\n{case.model.body}"


@cases(1100)
def test_true_bands_are_proven(source: random.Random) -> None:
    case = true_case(Draw(source))
    judged = judge(case)
    assert judged.judgement is Judgement.PROVEN, (judged, text_of(case))


@cases(600)
def test_mutated_masks_are_not_taken_for_another_band(source: random.Random) -> None:
    case = mutant(Draw(source))
    judged = judge(case)
    assert judged.judgement in ACCEPTED, (judged, text_of(case))


@cases(150)
def test_constant_bands_are_proven(source: random.Random) -> None:
    case = array_case(Draw(source), flipped=False)
    judged = judge(case)
    assert judged.judgement is Judgement.PROVEN, (judged, text_of(case))


@cases(150)
def test_one_flipped_cell_is_seen(source: random.Random) -> None:
    case = array_case(Draw(source), flipped=True)
    judged = judge(case)
    assert judged.judgement in ACCEPTED, (judged, text_of(case))


@cases(150)
def test_other_kinds_are_named(source: random.Random) -> None:
    """Chunks, dilation, prefixes and global tokens: proven to be what they are, with a true witness against the nearest band."""
    drawn = kind_case(Draw(source))
    for queries, keys in ((1, 1), (9, 9), (4, 13), (13, 4)):
        places = np.arange(queries)[:, None] + (keys - queries if drawn.alignment is Alignment.BOTTOM_RIGHT else 0)
        lengths = (queries, queries) if drawn.case.model.keys == "S" else (queries, keys)
        places = places if drawn.case.model.keys == "T" else np.arange(queries)[:, None]
        cells = drawn.case.model.cells(*lengths)
        expected = drawn.cells(places, np.arange(lengths[1])[None, :])
        assert np.array_equal(cells, np.broadcast_to(expected, cells.shape))
    judged = judge(drawn.case)
    assert judged.judgement is Judgement.REFUSED, (judged, text_of(drawn.case))
    assert judged.verdict.kind is drawn.kind, (judged, text_of(drawn.case))


@pytest.mark.parametrize("seed", range(20))
def test_a_wrong_band_is_noticed(seed: int) -> None:
    """The judge can fail: with a bound off by one, or the padding left out, a proof does not pass."""
    from dataclasses import replace

    from tests.passes.judge import agrees

    case = true_case(Draw(random.Random(seed)))
    proof = judge(case).verdict
    assert isinstance(proof, BandProof)
    near = [bound for bound in (proof.mask.left, proof.mask.right) if bound is not None and 0 <= bound < 100]
    if near and case.model.queries == "S":
        side = "left" if proof.mask.left == near[0] else "right"
        wrong = replace(proof, mask=replace(proof.mask, **{side: near[0] + 1}))
        assert not agrees(case, wrong)
    if proof.residuals and case.model.queries == "S":
        assert not agrees(case, replace(proof, residuals=()))
