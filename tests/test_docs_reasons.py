"""Every refusal code that the source can give has its section in docs/reasons.md, under the anchor that the reports link to."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from swacompile.attention import Kind

ROOT = Path(__file__).parent.parent
REASONS = ROOT / "docs" / "reasons.md"
RAISED = {"NotReadable": 0, "NoGrid": 0, "_Refused": 0, "_refused": 2}
VALUES = ("Verdict", "Refutation", "_Operand")
# Codes that are made from a kind's name.
MADE = {str(kind).replace("_", "-") for kind in (Kind.CHUNKED, Kind.DILATED, Kind.PREFIX, Kind.GLOBAL_PLUS_BAND)}


def codes() -> set[str]:
    files = [*ROOT.glob("passes/**/*.py"), *ROOT.glob("swacompile/*.py"), *ROOT.glob("swacompile/frontends/*.py")]
    return MADE | {code for file in files for code in codes_in(ast.parse(file.read_text()))}


def codes_in(tree: ast.AST) -> Iterator[str]:
    for call in ast.walk(tree):
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
            continue
        given: list[ast.expr] = [
            keyword.value for keyword in call.keywords if keyword.arg == "code" and call.func.id in VALUES
        ]
        position = RAISED.get(call.func.id)
        given += [] if position is None or len(call.args) <= position else [call.args[position]]
        yield from (node.value for node in given if isinstance(node, ast.Constant) and isinstance(node.value, str))


def sections() -> list[str]:
    return re.findall(r"^## (\S+)$", REASONS.read_text(), re.MULTILINE)


def test_the_codes_are_found() -> None:
    assert {"not-a-band", "data-dependent", "overflow", "residual", "rank", "chunked"} <= codes()


def test_every_code_has_a_section_and_every_section_a_code() -> None:
    assert set(sections()) == codes()


def test_every_section_says_what_to_do() -> None:
    text = REASONS.read_text()
    for code, body in re.findall(r"^## (\S+)$\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL):
        assert "What to do:" in body, code


def test_sections_are_in_order() -> None:
    assert sections() == sorted(sections())
