"""Workloads of real models, as their published configurations give head sizes, groups and windows, and of a model file.

swacompile tune $(python -m swacompile.tuning.shapes bf16 4096 32768) --target nvidia_h200 --export-bundle work.tar --trials 9
"""

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from swacompile.attention import Kind
from swacompile.index_expr import const_int
from swacompile.passes.plan_rewrite import Replacement
from swacompile.workload import DType, Feature, Workload

_DTYPES = {dtype.long_name: dtype for dtype in DType}
USUAL_LENGTH = 4096
"""Length that is tuned for where a model leaves it open."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """The windowed attention of a published model. `window` counts the keys that a query sees, its own among them."""

    model: str
    head_size: int
    heads: int
    kv_heads: int
    window: int
    features: frozenset[Feature] = frozenset()

    def workload(self, dtype: DType, length: int, *, decode: bool = False) -> Workload:
        return Workload.of(
            dtype=dtype,
            head_size=self.head_size,
            value_size=self.head_size,
            group=self.heads // self.kv_heads,
            window=self.window,
            length=length,
            features=self.features | ({Feature.DECODE} if decode else set()),
        )


MODELS: tuple[ModelShape, ...] = (
    ModelShape(model="Mistral-7B-v0.1", head_size=128, heads=32, kv_heads=8, window=4096),
    ModelShape(
        model="Gemma-2-2B", head_size=256, heads=8, kv_heads=4, window=4096, features=frozenset({Feature.SOFTCAP})
    ),
    ModelShape(model="Gemma-3-1B", head_size=256, heads=4, kv_heads=1, window=512),
    ModelShape(model="Gemma-3-4B", head_size=256, heads=8, kv_heads=4, window=1024),
    ModelShape(model="Phi-3-mini-4k", head_size=96, heads=32, kv_heads=32, window=2047),
    ModelShape(
        model="gpt-oss-20b", head_size=64, heads=64, kv_heads=8, window=128, features=frozenset({Feature.SINKS})
    ),
    ModelShape(model="Qwen2.5-0.5B", head_size=64, heads=14, kv_heads=2, window=32768),
    ModelShape(
        model="ModernBERT-base", head_size=64, heads=12, kv_heads=12, window=129,
        features=frozenset({Feature.TWO_SIDED}),
    ),
    ModelShape(model="Starcoder2-3B", head_size=128, heads=24, kv_heads=2, window=4096),
    ModelShape(model="Command-R7B", head_size=128, heads=32, kv_heads=8, window=4096),
    ModelShape(model="OLMo-3-7B", head_size=128, heads=32, kv_heads=32, window=4096),
)  # fmt: skip


def model_workloads(dtype: DType, lengths: Sequence[int]) -> tuple[Workload, ...]:
    """Prefill and decode of all MODELS at some lengths, each once. Encoders do not decode, and a decoded token reads no more
    than its window: beyond it one length stands for all.
    """
    wanted = []
    for model in MODELS:
        wanted += [model.workload(dtype, length) for length in lengths]
        if Feature.TWO_SIDED not in model.features:
            longer = sorted(length for length in lengths if length >= model.window)[:1]
            shorter = [length for length in lengths if length < model.window]
            wanted += [model.workload(dtype, length, decode=True) for length in (*shorter, *longer)]
    return tuple(dict.fromkeys(wanted))


def workloads_of(replaced: Iterable[Replacement]) -> tuple[Workload, ...]:
    """What a model's replaced attentions ask for, each once: the call as it is exported, or prefill and decode where lengths are open."""
    return tuple(dict.fromkeys(workload for replacement in replaced for workload in _workloads(replacement)))


def workloads_of_model(model: Path, *, full: bool = False) -> tuple[Workload, ...]:
    """The workloads of a model file's attentions that would be replaced. Raises ModelError."""
    from swacompile import pipeline
    from swacompile.passes.plan_rewrite import plan_rewrite
    from swacompile.passes.read_masks import read_masks

    reading = read_masks(pipeline.read(model).graph)
    findings = pipeline.find(reading)
    if model.suffix == ".pt2":
        outcomes = plan_rewrite(reading, findings, full=full, dtypes=tuple(_DTYPES))
    else:
        outcomes = plan_rewrite(reading, findings, full=full)
    return workloads_of(outcome for outcome in outcomes if isinstance(outcome, Replacement))


def _workloads(replacement: Replacement) -> Iterator[Workload]:
    site = replacement.site
    queries, keys = const_int(site.axes.queries), const_int(site.axes.keys)
    for decode in (False, True):
        if queries is not None and decode != (queries == 1):
            continue
        yield Workload.of(
            dtype=_DTYPES[site.dtype],
            head_size=site.head_size or 1,
            value_size=site.value_head_size or 1,
            group=site.heads // site.kv_heads,
            window=_window(replacement),
            length=keys or USUAL_LENGTH,
            features=_features(replacement) | ({Feature.DECODE} if decode else set()),
        )


def _window(replacement: Replacement) -> int | None:
    left, right = replacement.left_window_size, replacement.right_window_size
    if left < 0 and right < 0:
        return None
    return None if left < 0 else left + max(right, 0) + 1


def _features(replacement: Replacement) -> frozenset[Feature]:
    site = replacement.site
    present = {
        Feature.TWO_SIDED: replacement.right_window_size != 0,
        Feature.KEY_PADDING: replacement.key_padding is not None,
        Feature.SEGMENTS: replacement.segments is not None,
        Feature.SINKS: site.sinks is not None,
        Feature.BIAS: replacement.bias is not None,
        Feature.ALIBI: replacement.alibi_slopes is not None,
        Feature.SOFTCAP: bool(site.softcap),
        Feature.ZEROED: replacement.proof.kind is Kind.ZEROED,
    }
    return frozenset(feature for feature, is_there in present.items() if is_there)


if __name__ == "__main__":
    print(*model_workloads(DType(sys.argv[1]), [int(text) for text in sys.argv[2:]]))
