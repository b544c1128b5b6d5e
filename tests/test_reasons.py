"""Every reason that the compiler gives is explained."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
GIVEN = re.compile(
    r"""(?:NotReadable|_Incomparable)\(\s*"([a-z]+(?:-[a-z]+)*)"|\bcode="([a-z]+(?:-[a-z]+)*)"|_refused\(\s*site,\s*proof,\s*"([a-z]+(?:-[a-z]+)*)\"""",
    re.DOTALL,
)


def test_every_code_has_a_section():
    sources = [*(ROOT / "passes").rglob("*.py"), *(ROOT / "swacompile" / "frontends").glob("*.py")]
    codes = {code for path in sources for match in GIVEN.findall(path.read_text()) for code in match if code}
    assert len(codes) > 20
    sections = set(re.findall(r"^## (\S+)$", (ROOT / "docs" / "reasons.md").read_text(), re.MULTILINE))
    assert codes <= sections
