"""Workload: classes of window and length, and its text both ways."""

import pytest

from swacompile.errors import ArgumentError
from swacompile.workload import DType, Feature, Workload


def test_text_is_stable_both_ways() -> None:
    features = frozenset({Feature.SOFTCAP, Feature.KEY_PADDING})
    workload = Workload.of(
        dtype=DType.BF16, head_size=128, value_size=64, group=4, window=500, length=2049, features=features
    )
    assert str(workload) == "bf16-d128-v64-g4-w512-n4096-key_padding-softcap"
    assert Workload.parse(str(workload)) == workload


def test_unbounded_window() -> None:
    workload = Workload.of(dtype=DType.F32, head_size=64, value_size=64, group=1, window=None, length=1)
    assert str(workload) == "f32-d64-v64-g1-wall-n16"
    assert Workload.parse(str(workload)) == workload


@pytest.mark.parametrize(
    ("text", "words"), [("f32-d64", "expected for example"), ("f32-d64-v64-g1-w16-n16-warp", "'warp'")]
)
def test_refused_text(text: str, words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        Workload.parse(text)


def test_only_classes_make_a_key() -> None:
    with pytest.raises(ValueError, match=r"use Workload\.of"):
        Workload(dtype=DType.F32, head_size=64, value_size=64, group=1, window=500, length=16)
