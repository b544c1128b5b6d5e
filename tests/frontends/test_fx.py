"""Windows in torch programs: every spelling gives the band that the program computes, and near misses give another or none."""

import json
import os
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from swacompile import pipeline  # noqa: E402
from swacompile.attention import Attention, BandProof, Finding, Kind, MaskedRows, Refutation, ResidualKind  # noqa: E402
from swacompile.band import Alignment, BandMask  # noqa: E402
from swacompile.errors import ModelError  # noqa: E402
from swacompile.frontends.fx import FxModel, read_exported_program, read_graph_module, read_pt2  # noqa: E402
from swacompile.passes.read_masks import read_masks  # noqa: E402
from tests.frontends import fx_models as spelled  # noqa: E402
from tests.frontends.fx_models import LENGTH, PAST, operands  # noqa: E402

pytestmark = pytest.mark.torch
LONG = {2: torch.export.Dim("length", min=3, max=16)}
GROWING = (LONG, LONG, LONG)


def findings_of(model: FxModel) -> tuple[Finding, ...]:
    return pipeline.find(read_masks(model.graph))


def only(model: FxModel) -> Finding:
    (finding,) = findings_of(model)
    return finding


def proof_of(model: FxModel) -> BandProof:
    verdict = only(model).verdict
    assert isinstance(verdict, BandProof), verdict
    return verdict


def refusal_of(model: FxModel) -> Refutation:
    verdict = only(model).verdict
    assert isinstance(verdict, Refutation), verdict
    return verdict


def export(
    module: torch.nn.Module,
    args: tuple[Any, ...],
    dynamic_shapes: Any = None,
    *,
    core: bool = False,
    strict: bool = False,
) -> FxModel:
    program = torch.export.export(module, args, dynamic_shapes=dynamic_shapes, strict=strict)
    return read_exported_program(program.run_decompositions() if core else program)


def band_of(mask: torch.Tensor) -> tuple[int, int]:
    """The band that a mask is, by looking at it."""
    distance = torch.arange(mask.shape[1])[None] - torch.arange(mask.shape[0])[:, None]
    left, right = -int(distance[mask].min()), int(distance[mask].max())
    assert torch.equal(mask, (distance >= -left) & (distance <= right))
    return left, right


def test_softmax_and_positions_in_parts() -> None:
    """Decompositions that a compiler asks for: a softmax as maximum, exponential, sum and quotient; positions as prims.iota."""
    from torch._decomp import core_aten_decompositions, get_decompositions

    aten = torch.ops.aten
    operators = [aten._softmax, aten.arange.default, aten.arange.start, aten.arange.start_step, aten.masked_fill]
    program = torch.export.export(spelled.Einsum(spelled.and_of_halves, 4), operands(), dynamic_shapes=GROWING)
    program = program.run_decompositions({**core_aten_decompositions(), **get_decompositions(operators)})
    names = {str(node.target) for node in program.graph.nodes}
    assert "prims.iota.default" in names and "aten._softmax.default" not in names
    proof = proof_of(read_exported_program(program))
    assert (proof.mask, proof.kind) == (BandMask(left=3, right=0), Kind.SLIDING)


def test_an_attention_in_a_branch_is_named() -> None:
    class Branch(torch.nn.Module):
        def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
                return torch.matmul(torch.matmul(query, key.transpose(2, 3)).softmax(-1), value)

            return torch.cond(query.sum() > 0, attend, lambda query, key, value: query + 0, (query, key, value))

    refusal = refusal_of(export(Branch(), operands()))
    assert (refusal.code, refusal.kind) == ("subgraph", Kind.UNKNOWN)


BANDS = (
    spelled.and_of_halves, spelled.absolute_distance, spelled.or_of_halves, spelled.union, spelled.triangles, spelled.triangles_apart,
    spelled.written_in_place, spelled.packed, spelled.without_gradients,
)  # fmt: skip


@pytest.mark.parametrize("mask", BANDS, ids=lambda mask: mask.__name__)
@pytest.mark.parametrize("form", ["operator", "core"])
def test_spellings_of_bands(mask, form):
    bands = []
    for window in (4, 5):
        truth = band_of(mask(40, window, None))
        model = export(spelled.Attend(mask, window), operands(), GROWING, core=form == "core")
        proof = proof_of(model)
        assert (proof.mask.left, proof.mask.right) == truth
        assert (proof.kind, proof.method, proof.residuals) == (Kind.SLIDING, "smt", ())
        bands.append(truth)
    assert bands[0] != bands[1]  # a window off by one is another band


@pytest.mark.parametrize("mask", [spelled.vmapped, spelled.vmapped_lookup], ids=lambda mask: mask.__name__)
def test_hidden_axes_of_vmap(mask):
    for window in (4, 5):
        model = export(spelled.Attend(mask, window), operands())
        assert any(
            node.target.__name__ == "_add_batch_dim"
            for node in model.module.graph.nodes
            if callable(node.target) and hasattr(node.target, "__name__")
        )
        proof = proof_of(model)
        assert (proof.mask.left, proof.mask.right) == band_of(mask(LENGTH, window, None))


def test_strict_export_is_read_alike():
    assert proof_of(
        export(spelled.Attend(spelled.and_of_halves, 4), operands(), GROWING, strict=True)
    ).mask == BandMask(left=3, right=0)


def test_a_window_wider_than_the_length_is_not_invented():
    proof = proof_of(export(spelled.Attend(spelled.and_of_halves, 30), operands()))
    assert (proof.mask.left, proof.mask.right, proof.kind) == (None, 0, Kind.FULL)
    assert proof.valid_for == (f"queries == {LENGTH}", f"keys == {LENGTH}")


def test_chunks_are_no_band():
    refusal = refusal_of(export(spelled.Attend(spelled.chunks, 4), operands(), GROWING))
    assert refusal.kind is Kind.CHUNKED
    assert "chunk size 4" in refusal.reason


def test_one_wrong_cell_is_refuted_with_a_witness():
    def mask(length: int, window: int, _: Any) -> torch.Tensor:
        q, k = spelled.positions(length)
        return ((k > q - window) & (k <= q)) | ((q == 7) & (k == 1))

    refusal = refusal_of(export(spelled.Attend(mask, 4), operands(), GROWING))
    assert refusal.witness is not None
    assert (refusal.witness.query, refusal.witness.key, refusal.witness.mask_shows) == (7, 1, True)


def test_padding_is_a_factor_of_the_band():
    batch = torch.export.Dim("batch", min=2)
    shapes = ({0: batch, **LONG}, {0: batch, **LONG}, {0: batch, **LONG}, {0: batch, 1: LONG[2]})
    padding = torch.ones(2, LENGTH, dtype=torch.long)
    for core in (False, True):
        proof = proof_of(
            export(spelled.Padded(spelled.and_of_halves, 4), (*operands(batch=2), padding), shapes, core=core)
        )
        assert proof.mask == BandMask(left=3, right=0)
        (residual,) = proof.residuals
        assert residual.kind is ResidualKind.KEY_PADDING
        assert "padding[b, k]" in str(residual.data)


def test_random_data_are_refused_by_name():
    noise = torch.randn(LENGTH, LENGTH)
    refusal = refusal_of(
        export(spelled.Noisy(spelled.and_of_halves, 4), (*operands(), noise), (*GROWING, {0: LONG[2], 1: LONG[2]}))
    )
    assert refusal.code == "data-dependent"
    assert "gt" in refusal.reason


def test_positions_that_are_an_input_leave_segments():
    places = torch.arange(LENGTH)[None]
    finding = only(export(spelled.Positioned(spelled.packed, 4), (*operands(), places), (*GROWING, {1: LONG[2]})))
    assert isinstance(finding.verdict, BandProof)
    assert finding.verdict.mask == BandMask(left=3, right=0)
    assert [residual.kind for residual in finding.verdict.residuals] == [ResidualKind.SEGMENTS]


# ------------------------------------------------------------------------------------------------- attention's own forms


@pytest.mark.parametrize("core", [False, True], ids=["training", "core"])
def test_eager_attention(core):
    module = spelled.Eager(spelled.and_of_halves, 4, softcap=2.0, sinks=True)
    finding = only(export(module, operands(), GROWING, core=core))
    site, proof = finding.attention, finding.verdict
    assert isinstance(site, Attention) and isinstance(proof, BandProof)
    assert (site.heads, site.kv_heads, site.scale, site.softcap, site.sinks) == (2, 1, 0.5, 2.0, "p_sinks")
    assert proof.mask == BandMask(left=3, right=0)


def test_contractions_by_name():
    finding = only(export(spelled.Einsum(spelled.absolute_distance, 3), operands(), GROWING))
    assert isinstance(finding.attention, Attention) and isinstance(finding.verdict, BandProof)
    assert (finding.attention.scale, finding.verdict.mask) == (0.5, BandMask(left=3, right=3))


def test_decomposed_attention_says_what_empty_rows_give():
    def site(core: bool) -> Attention:
        found = only(export(spelled.Attend(spelled.and_of_halves, 4), operands(), GROWING, core=core)).attention
        assert found is not None
        return found

    assert (site(False).form, site(True).form) == ("operator", "softmax")
    assert site(False).masked_rows is site(True).masked_rows is MaskedRows.ZERO
    assert site(False).scale == pytest.approx(site(True).scale)


class Causal(torch.nn.Module):
    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)


def test_is_causal_counts_from_the_top_left():
    proof = proof_of(export(Causal(), operands(12, queries=5)))
    assert (proof.mask, proof.mask.alignment) == (BandMask(left=None, right=0), Alignment.TOP_LEFT)


@pytest.mark.parametrize("batches", [(2, 1), (1, 2)])
def test_a_broadcast_batch_is_refused(batches):
    queries, keys = (operands(batch=batch) for batch in batches)
    refusal = refusal_of(export(spelled.Attend(spelled.and_of_halves, 4), (queries[0], keys[1], keys[2])))
    assert refusal.code == "batch"
    assert f"have batches {batches[0]}, {batches[1]}, {batches[1]}" in refusal.reason


class Dropping(torch.nn.Module):
    def forward(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, dropout_p=0.1)


def test_dropout_is_refused():
    refusal = refusal_of(export(Dropping(), operands()))
    assert refusal.code == "dropout"
    assert "training mode" in refusal.reason


# --------------------------------------------------------------------------------------------------------------- caches


@pytest.mark.parametrize("core", [False, True], ids=["training", "core"])
def test_decode_with_a_growing_cache(core):
    past = {2: torch.export.Dim("past", min=2, max=64)}
    args = (*operands(1), *operands(PAST)[1:])
    proof = proof_of(export(spelled.Decode(4), args, (None, None, None, past, past), core=core))
    assert (proof.mask.left, proof.mask.right, proof.mask.alignment) == (3, 0, Alignment.BOTTOM_RIGHT)


@pytest.mark.parametrize("queries", [1, 3])
def test_static_cache_counts_from_the_position(queries):
    for window in (4, 5):
        model = export(spelled.StaticCache(window), (*operands(queries), torch.tensor([6])))
        proof = proof_of(model)
        assert proof.mask == BandMask(left=window - 1, right=0)
        (offset,) = proof.residuals
        assert (offset.kind, str(offset.data)) == (ResidualKind.OFFSET, "position[0]")
        assert not {"b_keys", "b_values", "b_length"} & set(model.graph.constants)  # what is written is no constant


def test_constant_masks_and_a_second_one():
    for window in (4, 5):
        assert proof_of(export(spelled.ConstantMasks(window), operands(), GROWING)).mask == BandMask(
            left=window - 1, right=0
        )


# -------------------------------------------------------------------------------------------------- graphs and files


def test_a_graph_module_is_exported_with_its_example_inputs():
    graph = torch.fx.symbolic_trace(
        spelled.Attend(lambda _, window, __: spelled.and_of_halves(LENGTH, window, None), 4)
    )
    assert proof_of(read_graph_module(graph, operands())).mask == BandMask(left=3, right=0)
    with pytest.raises(
        ModelError, match="expected ATen operators with metadata, found an FX graph without. Give example inputs"
    ):
        read_graph_module(graph)
    with pytest.raises(ModelError, match="cannot be exported with these example inputs"):
        read_graph_module(graph, operands(LENGTH + 1))


def test_a_graph_of_aten_operators_is_read_as_it_is():
    program = torch.export.export(spelled.Attend(spelled.and_of_halves, 4), operands(), dynamic_shapes=GROWING)
    model = read_graph_module(program.graph_module)
    assert (model.program, model.module) == (None, program.graph_module)
    assert proof_of(model).mask == BandMask(left=3, right=0)


def test_inspect_reads_a_file(tmp_path, run_cli):
    path = tmp_path / "model.pt2"
    torch.export.save(torch.export.export(spelled.Attend(spelled.and_of_halves, 4), operands()), path)
    (finding,) = pipeline.inspect(path).findings
    assert isinstance(finding.verdict, BandProof) and finding.verdict.mask == BandMask(left=3, right=0)
    shown = run_cli("inspect", path)
    assert shown.code == 0 and "(3, 0)" in shown.out
    refused = run_cli("rewrite", path, "-o", tmp_path / "out.onnx")
    assert refused.code == 2 and "expected a path that ends in .pt2" in refused.err


class Answer(dict):
    """A result type that some package registers."""


def test_files_whose_result_types_are_not_registered(tmp_path):
    class Module(spelled.Attend):
        def forward(self, *args: Any) -> Any:
            return Answer(out=super().forward(*args))

    path = tmp_path / "model.pt2"
    torch.utils._pytree.register_pytree_node(
        Answer,
        lambda answer: (list(answer.values()), list(answer)),
        lambda values, names: Answer(zip(names, values, strict=True)),
        serialized_type_name="somewhere.else.Answer",
    )
    try:
        torch.export.save(torch.export.export(Module(spelled.and_of_halves, 4), operands()), path)
    finally:
        torch.utils._pytree._deregister_pytree_node(Answer)
    assert proof_of(read_pt2(path)).mask == BandMask(left=3, right=0)
    assert "somewhere.else.Answer" not in torch.utils._pytree.SERIALIZED_TYPE_TO_PYTHON_TYPE


def test_damaged_files(tmp_path):
    path = tmp_path / "model.pt2"
    with pytest.raises(ModelError, match="expected a .pt2 file, found nothing"):
        read_pt2(path)
    torch.export.save(torch.export.export(spelled.Attend(spelled.and_of_halves, 4), operands()), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        ModelError, match=r"expected a .pt2 archive, found \d+ bytes that are none .* The file is damaged, truncated"
    ):
        read_pt2(path)
    path.write_bytes(whole)
    _rewritten(path, lambda name, data: data.replace(b"ops.aten.scaled", b"ops.mine.scaled"))
    with pytest.raises(
        ModelError,
        match=r"cannot be loaded \(.* uses custom operators of a package that must be imported first",
    ):
        read_pt2(path)
    _rewritten(path, lambda name, data: None if name.endswith("model.json") else data)
    with pytest.raises(
        ModelError, match="expected a program that torch.export.save wrote, found an archive without one"
    ):
        read_pt2(path)


def _rewritten(path: Path, change: Callable[[str, bytes], bytes | None]) -> None:
    with zipfile.ZipFile(path) as archive:
        changed = {name: change(name, archive.read(name)) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in changed.items():
            if data is not None:
                archive.writestr(name, data)


def test_missing_torch_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.delattr("swacompile.frontends.fx")
    monkeypatch.delitem(sys.modules, "swacompile.frontends.fx")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ModelError, match=r"Install swacompile\[torch\]"):
        pipeline.read(tmp_path / "model.pt2")


# --------------------------------------------------------------------------------------------------------------- corpus


def corpus_programs() -> list[Any]:
    """The .pt2 files of the corpus that SWACOMPILE_CORPUS names; none where it is not set."""
    folder = os.environ.get("SWACOMPILE_CORPUS")
    if not folder:
        return []
    manifest = json.loads((Path(folder) / "manifest.json").read_text())
    programs = [
        artifact
        for artifact in manifest["artifacts"]
        if artifact["file"].endswith(".pt2") and artifact["status"] == "ok"
    ]
    return [
        pytest.param(
            Path(folder) / artifact["file"], manifest["models"][artifact["model"]]["layers"], id=artifact["file"]
        )
        for artifact in programs
    ]


@pytest.mark.parametrize(("path", "layers"), corpus_programs())
def test_corpus(path, layers):
    findings = pipeline.inspect(path).findings
    assert len(findings) == len(layers)
    for finding, layer in zip(findings, layers, strict=True):
        site, verdict = finding.attention, finding.verdict
        if layer["kind"] not in ("full", "sliding"):
            assert isinstance(verdict, Refutation) and verdict.kind.value == layer["kind"]
            continue
        assert isinstance(site, Attention) and isinstance(verdict, BandProof), verdict
        assert (site.heads, site.kv_heads, site.softcap) == (layer["q_heads"], layer["kv_heads"], layer["softcap"])
        assert site.scale == pytest.approx(layer["scale"], rel=1e-5)
        assert (site.sinks is not None) == layer["sinks"]
        for found, true in ((verdict.mask.left, layer["window_left"]), (verdict.mask.right, layer["window_right"])):
            assert found == (None if true < 0 or _hidden_by_length(site, true) else true)


def _hidden_by_length(site: Attention, bound: int) -> bool:
    """Whether the export has so few keys that a bound hides none of them: it cannot be recovered, and is not invented."""
    return site.axes.keys.is_const and site.axes.queries.is_const and bound >= int(str(site.axes.keys)) - 1
