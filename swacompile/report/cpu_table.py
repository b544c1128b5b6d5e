"""Tables of the CPU benchmark in Markdown: every figure of every contender, or a line for each case with the peers beside each other.

`python -m swacompile.report.cpu_table FILE...` prints the latter for documents that `swacompile bench --json` wrote.
"""

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from swacompile.report.bench_cpu import Row
from swacompile.report.cpu_cases import Case
from swacompile.report.cpu_contenders import OURS, PEERS
from swacompile.workload import DType


def details(rows: Iterable[Row]) -> str:
    """A line for every contender and case. Of decode, where reading is all that counts, the rate is in bytes."""
    lines = [
        "| attention | threads | contender | ms (10-90 %) | time / ours | useful rate | of sgemm, of read | extra MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        start = f"| {row.case} | {row.threads} | {row.contender} |"
        if row.refused:
            lines.append(f"{start} {row.refused} | | | | |")
            continue
        decode = row.case.queries == 1
        rate = f"{row.gbytes:.1f} GB/s" if decode else f"{row.gflops:.0f} GFLOP/s"
        share = _percent(row.of_read if decode else row.of_product)
        lines.append(f"{start} {spread(row)} | {row.ratio:.2f} | {rate} | {share} | {row.extra_bytes / 1e6:.1f} |")
    return "\n".join(lines)


def overview(rows: Sequence[Row]) -> str:
    """A line for every case: our time and share of the machine, and how many times as long each peer takes; a dash where it has no result."""
    peers = [peer.name for peer in PEERS if any(row.contender == peer.name for row in rows)]
    lines = [
        f"| attention | threads | ours, ms (10-90 %) | of sgemm, of read | {' | '.join(peers)} |",
        "|" + "---|" * (4 + len(peers)),
    ]
    for group in by_case(rows):
        ours = group[OURS.name]
        share = _percent(ours.of_read if ours.case.queries == 1 else ours.of_product)
        best = best_peer(group)
        cells = (_cell(group.get(name), best) for name in peers)
        lines.append(f"| {ours.case} | {ours.threads} | {spread(ours)} | {share} | {' | '.join(cells)} |")
    return "\n".join(lines)


def reasons(rows: Iterable[Row]) -> Iterator[str]:
    """Why contenders have no result, each reason once."""
    yield from dict.fromkeys(f"{row.contender}: {row.refused}" for row in rows if row.refused)


def by_case(rows: Iterable[Row]) -> Iterator[dict[str, Row]]:
    """The rows of one case and number of threads, by contender."""
    groups: dict[tuple[Case, int], dict[str, Row]] = {}
    for row in rows:
        groups.setdefault((row.case, row.threads), {})[row.contender] = row
    yield from groups.values()


def best_peer(group: dict[str, Row]) -> Row | None:
    """The fastest contender beside ours."""
    timed = [row for name, row in group.items() if name != OURS.name and not row.refused]
    return min(timed, key=lambda row: row.ratio, default=None)


def spread(row: Row) -> str:
    return f"{1e3 * row.median:.3g} ({1e3 * row.low:.3g}-{1e3 * row.high:.3g})"


def from_json(text: str) -> list[Row]:
    """The rows of a document."""
    document: dict[str, Any] = json.loads(text)
    return [Row(**{**row, "case": _case(row["case"])}) for row in document["rows"]]


def _case(fields: dict[str, Any]) -> Case:
    return Case(**{**fields, "dtype": DType(fields["dtype"])})


def _cell(row: Row | None, best: Row | None) -> str:
    if row is None or row.refused:
        return "-"
    return f"**{row.ratio:.2f}**" if row is best else f"{row.ratio:.2f}"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def main() -> None:
    rows = [row for name in sys.argv[1:] for row in from_json(Path(name).read_text())]
    print("\n".join([overview(rows), "", *(f"- {reason}" for reason in reasons(rows))]))


if __name__ == "__main__":
    main()
