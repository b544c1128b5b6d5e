"""FX graphs that nobody checks the sizes of: the source's result, or an error that says what was expected."""

import pytest

torch = pytest.importorskip("torch")

from torch.fx.experimental.proxy_tensor import make_fx  # noqa: E402

import swacompile  # noqa: E402
from swacompile.frontends.fx_guards import aten  # noqa: E402
from tests.tolerances import MODEL_ATOL  # noqa: E402

pytestmark = [pytest.mark.torch, pytest.mark.cpu]
WINDOW, LENGTH = 4, 9
LOWEST = torch.finfo(torch.float32).min


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, padding: torch.Tensor, like: torch.Tensor
) -> torch.Tensor:
    """A window whose lengths are those of `like`, and padding of integers that are 0 and 1."""
    line = torch.arange(like.shape[0])
    near = (line[None] <= line[:, None]) & (line[None] > line[:, None] - WINDOW)
    mask = torch.where(near, 0.0, LOWEST) + (1.0 - padding[:, None, None, :].float()) * LOWEST
    return torch.softmax(query @ key.transpose(2, 3) + mask, -1) @ value


def operands() -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    padding = torch.ones(2, LENGTH, dtype=torch.long)
    padding[1, -2:] = 0
    return [*(torch.randn(2, 2, LENGTH, 8, generator=draw) for _ in range(3)), padding, torch.zeros(LENGTH)]


@pytest.mark.parametrize("mode", ["real", "fake"])
def test_sizes_of_a_traced_graph(mode: str) -> None:
    """Every axis as 1, alone. The source broadcasts some of them; its graph has the window of the length that it was traced at."""
    given = operands()
    source = make_fx(attend, tracing_mode=mode)(*given)
    done = swacompile.rewrite(source)
    assert len(done.replaced) == 1
    assert (source(*given) - done.program(*given)).abs().max() < MODEL_ATOL
    ran, errors = 0, set[str]()
    for place, operand in enumerate(given):
        for axis in range(operand.dim()):
            fed = [*given[:place], operand.narrow(axis, 0, 1).contiguous(), *given[place + 1 :]]
            try:
                expected = source(*fed)
            except (RuntimeError, IndexError):
                continue
            ran += 1
            try:
                found = done.program(*fed)
            except RuntimeError as error:
                errors.add(str(error).splitlines()[0])
                continue
            assert found.shape == expected.shape and (found - expected).abs().max() < MODEL_ATOL, (place, axis)
    assert ran > 3
    assert any("swacompile expects the number of queries" in error for error in errors), errors
    assert all("expect" in error or "is invalid for input of size" in error for error in errors), errors


def test_numbers_that_are_not_0_and_1() -> None:
    *given, padding, like = operands()
    program = swacompile.rewrite(torch.export.export(Module(), (*given, padding, like))).program
    with pytest.raises(RuntimeError, match=r"swacompile expects padding in \{0, 1\}"):
        program.module()(*given, 2 * padding, like)


def test_an_exported_program_checks_sizes_itself() -> None:
    program = swacompile.rewrite(torch.export.export(Module(), tuple(operands()))).program
    assert all(node.target is not aten._assert_scalar.default for node in program.graph.nodes)


class Module(torch.nn.Module):
    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, padding: torch.Tensor, like: torch.Tensor
    ) -> torch.Tensor:
        return attend(query, key, value, padding, like)
