"""Offline bundles.

Candidates built here, measured on a machine without compiler or network, and their results taken in.
"""

import importlib.util
import json
import random
import shutil
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from swacompile.errors import ArgumentError, OutputError, ToolchainError
from swacompile.target import Target, TargetClass
from swacompile.tuning import runner, store
from swacompile.tuning.config import Config
from swacompile.tuning.database import Database
from swacompile.tuning.measure import Candidate, Effort, Workbench, provenance_here
from swacompile.tuning.record import Origin
from swacompile.tuning.rules import rule_for
from swacompile.tuning.search import SEEDS
from swacompile.workload import Workload

EFFORT = Effort(rung=1, samples=9, min_ms=10.0)
"""Nobody looks at the results before all are measured, so each is measured well."""
RANDOM_EVERY = 6
RUNNER_FILE = "swacompile_runner.py"
_PACKAGE = Path(__file__).parents[1]
_CARRIED = {
    TargetClass.CPU: ("tuning/__init__.py", "tuning/dlpack.py"),
    TargetClass.CUDA: (
        "tuning/__init__.py", "tuning/dlpack.py", "tuning/gpu.py", "tuning/turns.py",
        "runtime/__init__.py", "runtime/cuda/__init__.py", "runtime/cuda/launch.py", "runtime/cuda/library.py",
        "schedules/__init__.py", "schedules/cuda/__init__.py", "schedules/cuda/combine_symbols.py", "schedules/cuda/spec.py",
    ),
}  # fmt: skip
"""Files of this package that the runner imports."""
_RUNTIMES = {
    TargetClass.CPU: (runner.RUNTIME,),
    TargetClass.CUDA: (runner.RUNTIME, "libtvm_runtime_cuda.so"),
}


def pick(
    workload: Workload, target: Target, database: Database, *, trials: int, seed: int = 0
) -> tuple[Candidate, ...]:
    """The default, SEEDS Configs of earlier records, then neighbours of the default, and every RANDOM_EVERY-th a random one:
    `trials` in all, or as many as the space has. Neighbours that differ in one value go before those that differ in two.
    """
    rule = rule_for(workload, target)
    space = rule.space(workload, target)
    rng = random.Random(seed)
    around = list(space.neighbours(space.base))
    rng.shuffle(around)
    around.sort(key=lambda config: _differences(config, space.base), reverse=True)
    chosen = {space.base: Origin.DEFAULT}
    seeds = [config for config in database.earlier(rule, workload, target) if config not in chosen]
    chosen |= dict.fromkeys(seeds[: min(SEEDS, trials - 1)], Origin.SEARCH)
    while len(chosen) < trials:
        config = around.pop() if around and len(chosen) % RANDOM_EVERY else space.sample(rng, set(chosen))
        if config is None:
            break
        chosen.setdefault(config, Origin.SEARCH)
    return tuple(Candidate(workload=workload, config=config, origin=origin) for config, origin in chosen.items())


def _differences(a: Config, b: Config) -> int:
    return sum(x != y for x, y in zip(a.values, b.values, strict=True))


def export(candidates: Sequence[Candidate], bench: Workbench, out: Path) -> int:
    """Build candidates and write them with the runner and TVM's runtime libraries to a .tar, or a .tar.xz of a third of the size;
    gives the number that could be built.

    Raises OutputError, and ToolchainError where none could be built.
    """
    outcomes = bench.build(candidates)
    built = [candidate for candidate, failure in outcomes.items() if failure is None]
    if not built:
        why = next((failure.message for failure in outcomes.values() if failure is not None), "there are none")
        raise ToolchainError(f"no candidate for {bench.target.name} could be built: {why}")
    folder, kind = bench.folder, bench.target.target_class
    jobs = [bench.job(candidate, EFFORT) | {"record": _template(candidate, bench)} for candidate in built]
    (folder / runner.MANIFEST).write_text(json.dumps({"format": runner.FORMAT, "jobs": jobs}, indent=1))
    shutil.copyfile(runner.__file__, folder / RUNNER_FILE)
    for library in _RUNTIMES[kind]:
        shutil.copyfile(_installed_runtime(library), folder / library)
    names = {runner.MANIFEST, RUNNER_FILE, *_RUNTIMES[kind], *_carried(kind, folder)}
    names |= {file.name for job in jobs for file in folder.glob(f"{Path(job['library']).stem}.*")}
    names |= {problem["expected"] for job in jobs for problem in job["problems"]}
    try:
        with tarfile.open(out, "w:xz" if out.suffix == ".xz" else "w") as tar:
            for name in sorted(names):
                tar.add(folder / name, arcname=name, filter=_anonymous)
    except OSError as error:
        raise OutputError(f"{out}: the bundle could not be written ({error.strerror or error}).") from error
    return len(built)


def _carried(kind: TargetClass, folder: Path) -> list[str]:
    """Names of the package's files that a kind of target needs, copied to `folder`. The package itself is empty there."""
    root = folder / "swacompile"
    for name in _CARRIED[kind]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(_PACKAGE / name, root / name)
    (root / "__init__.py").touch()
    return ["swacompile/__init__.py", *(f"swacompile/{name}" for name in _CARRIED[kind])]


def take_in(results: Path, database: Database) -> tuple[int, int]:
    """Add a runner's results to the database: numbers of new records and of bad lines, which are skipped.

    Raises ArgumentError where there is no such file.
    """
    if not results.is_file():
        raise ArgumentError(f"{results}: expected the results that a bundle's runner wrote, found no file")
    contents = store.read(results)
    return database.merge(contents.records), len(contents.bad)


def _template(candidate: Candidate, bench: Workbench) -> dict[str, Any]:
    """The fields of a record that are known before measuring."""
    origin = provenance_here(bench.target, device="", threads=1)
    return {
        "target": bench.target.name,
        "workload": str(candidate.workload),
        "config": str(candidate.config),
        "origin": str(candidate.origin),
        "rung": EFFORT.rung,
        "revision": origin.revision,
        "versions": origin.versions,
    }


def _installed_runtime(name: str) -> Path:
    spec = importlib.util.find_spec("tvm")
    for place in (spec.submodule_search_locations or ()) if spec is not None else ():
        if (library := Path(place, "lib", name)).is_file():
            return library
    raise OutputError(f"{name} is missing from the installed tvm: install apache-tvm again")


def _anonymous(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    """Without names and times of this machine: equal candidates give equal bundles."""
    entry.uid = entry.gid = entry.mtime = 0
    entry.uname = entry.gname = ""
    return entry
