"""The long run of the property tests: `python -m tests.passes.fuzz 100000 [--minutes 15] [--processes 2] [--seed 0]`.

Prints how many true bands were proven, and every false proof or false witness with its seed. Exit status 1 where there is one, or where fewer
than 99% of the true bands are proven.
"""

import argparse
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from multiprocessing import Pool

from tests.passes.grammar import Case, Draw, array_case, mutant, true_case
from tests.passes.judge import Judgement, judge
from tests.passes.kinds import KindCase, kind_case

KINDS = ("band", "band", "band", "band", "mutant", "mutant", "mutant", "array", "flipped", "kind")
WRONG = (Judgement.FALSE_PROOF, Judgement.FALSE_WITNESS, Judgement.OTHER_BAND, Judgement.NO_WITNESS)
Outcome = tuple[int, str, str]


def case_of(seed: int) -> tuple[str, Case]:
    kind, draw = KINDS[seed % len(KINDS)], Draw(random.Random(seed))
    match kind:
        case "band":
            return kind, true_case(draw)
        case "mutant":
            return kind, mutant(draw)
        case _:
            return kind, array_case(draw, flipped=kind == "flipped")


def outcome_of(seed: int) -> Outcome:
    try:
        if KINDS[seed % len(KINDS)] == "kind":
            return seed, "kind", named(kind_case(Draw(random.Random(seed))))
        kind, case = case_of(seed)
        return seed, kind, str(judge(case).judgement)
    except Exception as error:
        return seed, KINDS[seed % len(KINDS)], f"error: {type(error).__name__}"


def named(drawn: KindCase) -> str:
    judged = judge(drawn.case)
    right = judged.judgement is Judgement.REFUSED and judged.verdict.kind is drawn.kind
    return "named" if right else f"not named: {judged.judgement}, {judged.verdict.kind}"


def outcomes(seeds: range, minutes: float, processes: int) -> Iterator[Outcome]:
    end = time.monotonic() + 60 * minutes
    with Pool(processes) as pool:
        for outcome in pool.imap_unordered(outcome_of, seeds, chunksize=50):
            yield outcome
            if time.monotonic() > end:
                pool.terminate()
                return


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("count", type=int)
    parser.add_argument("--minutes", type=float, default=600)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    found: Counter[tuple[str, str]] = Counter()
    for seed, kind, judgement in outcomes(range(given.seed, given.seed + given.count), given.minutes, given.processes):
        found[kind, judgement] += 1
        if (
            judgement in WRONG
            or judgement.startswith(("error", "not named"))
            or (kind in ("band", "array") and judgement != Judgement.PROVEN)
        ):
            print(f"seed {seed}: {kind} {judgement}", flush=True)
    return report(found)


def report(found: Counter[tuple[str, str]]) -> int:
    for (kind, judgement), count in sorted(found.items()):
        print(f"{count:8} {kind}: {judgement}")
    true = {kind: sum(count for (k, _), count in found.items() if k == kind) for kind in ("band", "array")}
    proven = sum(found[kind, Judgement.PROVEN] for kind in true)
    share = proven / max(1, sum(true.values()))
    wrong = sum(count for (_, judgement), count in found.items() if judgement in WRONG or judgement.startswith("error"))
    false = sum(count for (_, judgement), count in found.items() if judgement == Judgement.FALSE_PROOF)
    print(
        f"{sum(found.values())} cases: {false} false proofs, {wrong} wrong answers of any sort, {share:.3%} of true bands proven"
    )
    return 0 if wrong == 0 and share >= 0.99 else 1


if __name__ == "__main__":
    sys.exit(main())
