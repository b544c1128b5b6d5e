"""The one form of a window, and its spellings in other tools."""

import pytest

from swacompile.band import Alignment, BandMask, spellings


def test_bounds_are_inclusive() -> None:
    band = BandMask(left=2, right=1)
    assert [band.shows(5, k, queries=10, keys=10) for k in range(2, 8)] == [False, True, True, True, True, False]


def test_alignment_decides_where_query_0_stands() -> None:
    top, bottom = (BandMask(left=0, right=0, alignment=alignment) for alignment in Alignment)
    assert top.shows(0, 0, queries=2, keys=5) and not top.shows(0, 3, queries=2, keys=5)
    assert bottom.shows(0, 3, queries=2, keys=5) and not bottom.shows(0, 0, queries=2, keys=5)


def test_negative_bounds_exclude_the_diagonal() -> None:
    band = BandMask(left=4, right=-2)
    assert [k for k in range(10) if band.shows(6, k, queries=10, keys=10)] == [2, 3, 4]


def test_an_empty_band_is_refused() -> None:
    with pytest.raises(ValueError, match=r"an empty band: left 2 \+ right -3 < 0"):
        BandMask(left=2, right=-3)


@pytest.mark.parametrize(
    ("band", "words"),
    [
        (BandMask(left=4095, right=0), ("sliding_window=4096", "window_size=(4095, 0)", "local_window_size=4096",
                                        "left_window_size=4095, right_window_size=0")),
        (BandMask(left=64, right=64), ("bidirectional, abs(q-k) <= 64", "window_size=(64, 64)", None, "left_window_size=64, right_window_size=64")),
        (BandMask(left=None, right=0), ("sliding_window=None", "window_size=(-1, 0)", "local_window_size=-1",
                                        "left_window_size=-1, right_window_size=0")),
        (BandMask(left=3, right=1), (None, "window_size=(3, 1)", None, "left_window_size=3, right_window_size=1")),
        (BandMask(left=4, right=-2), (None, None, None, None)),
    ],
)  # fmt: skip
def test_spellings(band: BandMask, words: tuple[str | None, ...]) -> None:
    assert spellings(band) == dict(zip(("hf", "flash_attention", "ort", "onnx"), words, strict=True))


def test_text() -> None:
    assert str(BandMask(left=None, right=3)) == "(unbounded, 3)"
    assert BandMask(left=1, right=0, alignment=Alignment.BOTTOM_RIGHT).aligned_text == "(1, 0) bottom-right"
