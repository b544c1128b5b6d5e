"""The commands `tune` and `records`: options in, calls of swacompile.tuning, tables out."""

import os
import platform
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from swacompile.errors import ArgumentError
from swacompile.target import TARGETS, Target, TargetClass, cpu_flags, host_targets, matching_targets, target_named
from swacompile.tuning import store
from swacompile.tuning.database import Database, best, groups
from swacompile.tuning.gains import Gain, gains, markdown, needed
from swacompile.tuning.record import Status, TuningRecord
from swacompile.tuning.rules import rule_for
from swacompile.tuning.search import Limits
from swacompile.tuning.tune import Tuned, tuned_elsewhere
from swacompile.tuning.turns import DEFAULT_LOCK
from swacompile.workload import Workload

INTERRUPTED = 130
TYPICAL_BUILD_SECONDS = 4.0
_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}

WIDE = 300  # columns where stdout is a file or a pipe: a Config is long
out, err = Console(width=None if sys.stdout.isatty() else WIDE), Console(stderr=True)

What = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[MODEL|WORKLOAD]...",
        help="Models, for all their workloads, or workloads such as f32-d64-v64-g4-w512-n2048.",
    ),
]
TargetName = Annotated[
    str | None,
    typer.Option("--target", help="The hardware, by the name of its target. Default: the best that this machine runs."),
]
Folder = Annotated[
    Path | None,
    typer.Option(
        "--records",
        help="Folder of the tuning database. Default: SWACOMPILE_RECORDS, or swacompile/records in the user's data folder.",
    ),
]


def records_folder(given: Path | None = None) -> Path:
    """The folder of the user's own records."""
    named = os.environ.get("SWACOMPILE_RECORDS")
    data = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return given or (Path(named) if named else Path(data) / "swacompile" / "records")


def tune(
    what: What = None,
    target_name: TargetName = None,
    budget: Annotated[str | None, typer.Option(help="Time for each workload: 60s, 10m.")] = None,
    trials: Annotated[
        int, typer.Option(min=1, help="Candidates for each workload, those measured earlier among them.")
    ] = 48,
    threads: Annotated[int, typer.Option(min=1, help="Threads that a kernel may use while it is timed.")] = 1,
    seed: Annotated[int, typer.Option(help="Of the random candidates.")] = 0,
    tracker: Annotated[
        str | None, typer.Option(help="Measure on the servers of a TVM RPC tracker, host:port. Trusted networks only.")
    ] = None,
    key: Annotated[str | None, typer.Option(help="The servers' key at the tracker.")] = None,
    export_bundle: Annotated[
        Path | None,
        typer.Option(
            help="Build candidates into this .tar or .tar.xz, to be measured on a machine without a compiler."
        ),
    ] = None,
    import_results: Annotated[Path | None, typer.Option(help="Take in what a bundle's runner measured.")] = None,
    lock: Annotated[
        Path, typer.Option(help="Tuners that share this file take turns: builds hold its lock shared, timing alone.")
    ] = DEFAULT_LOCK,
    chart: Annotated[
        Path | None, typer.Option(help="Write an HTML page with charts of the search, or of imported results.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the space and an estimate; build and measure nothing.")
    ] = False,
    folder: Folder = None,
) -> None:
    """Find the fastest kernel sizes for a model or a workload by measuring. Ctrl-C keeps what was measured; a second run continues.

    Example: `swacompile tune mistral.onnx --budget 60s`
    """
    database = Database(folders=(records_folder(folder),))
    if import_results is not None:
        _import(import_results, database, chart)
        return
    target = target_named(target_name) if target_name else host_targets()[0]
    workloads = tuple(dict.fromkeys(w for text in what or () for w in _workloads(text)))
    if not workloads:
        raise ArgumentError("nothing to tune: give a model whose attention has a window, or a workload")
    limits = Limits(trials=trials, seconds=_seconds(budget), seed=seed)
    if dry_run:
        _dry_run(workloads, target, limits)
    elif export_bundle is not None:
        _export(workloads, target, limits, database, export_bundle)
    else:
        _tune(
            workloads,
            target,
            limits,
            database,
            threads=threads,
            tracker=_address(tracker, key),
            key=key,
            lock=lock,
            chart=chart,
        )


def _tune(
    workloads: Sequence[Workload], target: Target, limits: Limits, database: Database, *, threads: int,
    tracker: tuple[str, int] | None, key: str | None, lock: Path, chart: Path | None,
) -> None:  # fmt: skip
    from swacompile.tuning.fleet import FleetMeasurer
    from swacompile.tuning.measure import LocalMeasurer, Measurer, Workbench
    from swacompile.tuning.tune import tune as run

    results: list[Tuned] = []
    with ExitStack() as stack:
        bench = stack.enter_context(Workbench(target, lock=lock))
        measurer: Measurer
        if tracker is not None and key is not None:
            measurer = stack.enter_context(FleetMeasurer(bench, tracker=tracker, key=key, threads=threads))
        else:
            measurer = LocalMeasurer(bench, threads=threads)
        for workload in workloads:
            with _progress(workload, limits) as listen:
                results.append(run(workload, measurer, database, limits, listen))
            if results[-1].interrupted:
                break
    for tuned in results:
        gain = "" if tuned.gain is None else f" ({tuned.gain:.2f} times as fast as the default)"
        out.print(f"{tuned.choice}{gain}", highlight=False, soft_wrap=True)
    if chart is not None:
        from swacompile.tuning.chart import page

        chart.write_text(page(results))
    if results[-1].interrupted:
        out.print("interrupted: what was measured is kept, the same command continues")
        raise typer.Exit(INTERRUPTED)


@contextmanager
def _progress(workload: Workload, limits: Limits) -> Iterator["_Listener"]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[best]}"),
    )
    with Progress(*columns, console=err) as bar:
        yield _Listener(bar, bar.add_task(str(workload), total=limits.trials, best=""))


class _Listener:
    """Shows each record as it comes: the bar counts candidates, and the text has the best so far."""

    def __init__(self, bar: Progress, task: TaskID) -> None:
        self._bar, self._task = bar, task
        self._records: list[TuningRecord] = []

    def __call__(self, record: TuningRecord) -> None:
        self._records.append(record)
        chosen = best(self._records)
        shown = f"best {chosen.median_us:,.1f} us" if chosen is not None and chosen.median_us else "none yet"
        self._bar.update(self._task, advance=int(record.rung == 0), best=shown)
        if record.status is not Status.OK:
            self._bar.console.print(
                f"{record.config}: {record.status}: {record.message}", highlight=False, soft_wrap=True
            )


def _dry_run(workloads: Sequence[Workload], target: Target, limits: Limits) -> None:
    table = Table("workload", "combinations", "possible", "default", "estimate")
    builders = os.cpu_count() or 1
    spaces: dict[str, None] = {}
    for workload in workloads:
        space = rule_for(workload, target).space(workload, target)
        possible, exact = space.possible()
        seconds = min(min(limits.trials, possible) * (TYPICAL_BUILD_SECONDS / builders + 1), limits.seconds or 1e9)
        shown = str(possible) if exact else f"about {possible}"
        table.add_row(str(workload), str(space.points), shown, str(space.base), f"at most {seconds:.0f} s")
        spaces[str(space)] = None
    out.print(table)
    for text in spaces:
        out.print(text, highlight=False, soft_wrap=True)


def _export(workloads: Sequence[Workload], target: Target, limits: Limits, database: Database, tar: Path) -> None:
    from swacompile.tuning import bundle
    from swacompile.tuning.measure import Workbench

    with Workbench(target) as bench, err.status(f"building candidates for {target.name}"):
        picked = [
            c for w in workloads for c in bundle.pick(w, target, database, trials=limits.trials, seed=limits.seed)
        ]
        count = bundle.export(picked, bench, tar)
    jobs = " --jobs 8" if target.target_class is TargetClass.CUDA else ""
    out.print(f"wrote {tar}: {count} candidates. On the other machine, with numpy and apache-tvm-ffi installed:")
    out.print(
        f"  tar xf {tar.name} {bundle.RUNNER_FILE} && python {bundle.RUNNER_FILE} {tar.name} -o results.jsonl{jobs}"
    )


def _import(results: Path, database: Database, chart: Path | None) -> None:
    from swacompile.tuning.bundle import take_in

    added, bad = take_in(results, database)
    out.print(f"{results}: {added} new records" + (f", {bad} bad lines skipped" if bad else ""))
    if chart is not None:
        from swacompile.tuning.chart import page

        chart.write_text(page([tuned_elsewhere(group) for group in groups(store.read(results).records)]))


def _workloads(text: str) -> tuple[Workload, ...]:
    if Path(text).exists():
        from swacompile.tuning.shapes import workloads_of_model

        return workloads_of_model(Path(text))
    if text.endswith((".onnx", ".pt2")):
        raise ArgumentError(f"{text}: there is no such model file")
    return (Workload.parse(text),)


def _seconds(text: str | None) -> float | None:
    """ "60s", "10m", "1h" or plain seconds."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text)
    if match is None:
        raise ArgumentError(f"not a time: {text!r}; expected for example 60s or 10m")
    return float(match[1]) * _UNITS[match[2]]


def _address(text: str | None, key: str | None) -> tuple[str, int] | None:
    if (text is None) != (key is None):
        raise ArgumentError("--tracker and --key belong together: the tracker's host:port, and its servers' key")
    if text is None:
        return None
    host, _, port = text.rpartition(":")
    if not host or not port.isdigit():
        raise ArgumentError(f"not an address: {text!r}; expected host:port, for example 127.0.0.1:9190")
    return host, int(port)


def targets() -> None:
    """List the hardware that kernels are built for.

    Example: `swacompile targets`
    """
    here = {target.name for target in matching_targets(platform.machine(), cpu_flags())}
    table = Table("target", "tag", "hardware", "limits", "records")
    for target in TARGETS:
        mark = " (this machine)" if target.name in here else ""
        shipped = len(Database().records(target.name))
        table.add_row(target.name, target.tag or "", target.description + mark, _limits(target), str(shipped or "none"))
    out.print(table)


def _limits(target: Target) -> str:
    if target.cuda is not None:
        limits = target.cuda
        return f"{limits.multiprocessors} multiprocessors, {limits.shared_per_block // 1024} KiB shared a block, {limits.l2_bytes >> 20} MiB L2"
    return f"{target.cpu.vector_registers} vectors of {target.cpu.vector_bits} bits" if target.cpu is not None else ""


def records(
    action: Annotated[
        str,
        typer.Argument(
            help="list: the best record of each workload; compare: beside the default; markdown: the same as tables for a document; prune: drop what is superseded; merge: add records of other files."
        ),
    ] = "list",
    files: Annotated[list[Path] | None, typer.Argument(help="For merge: files of records.")] = None,
    target_name: TargetName = None,
    folder: Folder = None,
) -> None:
    """Show or tidy the tuning database.

    Example: `swacompile records list`
    """
    database = Database(folders=(records_folder(folder),))
    targets = (target_named(target_name),) if target_name else TARGETS
    found = [gain for target in targets for gain in gains(database.records(target.name))]
    if action in ("list", "compare"):
        _show(found, compare=action == "compare")
    elif action == "markdown":
        print(markdown(found))
    elif action == "prune":
        _prune(database, targets)
    elif action == "merge":
        _merge(database, files or ())
    else:
        raise ArgumentError(f"unknown action {action!r}: expected list, compare, markdown, prune or merge")


def _show(found: Sequence[Gain], *, compare: bool) -> None:
    columns = ["target", "workload", "device", "threads", "date", "median", "spread"]
    table = Table(*columns, *(["default", "gain", "what differs"] if compare else ["config"]))
    for gain in found:
        record, rest = gain.chosen, [str(gain.chosen.config)]
        if compare:
            rest = [_time(gain.default), "" if gain.ratio is None else f"{gain.ratio:.2f}", gain.changes]
        table.add_row(
            record.target, str(record.workload), record.provenance.device, str(record.provenance.threads),
            record.date[:10], _time(record), f"{record.spread or 0:.1%}", *rest,
        )  # fmt: skip
    out.print(table)


def _time(record: TuningRecord | None) -> str:
    return f"{record.median_us:,.1f} us" if record is not None and record.median_us else ""


def _merge(database: Database, files: Sequence[Path]) -> None:
    if not files:
        raise ArgumentError("nothing to merge: give files of records")
    for path in files:
        if not path.is_file():
            raise ArgumentError(f"{path}: expected a file of records, found none")
    added = database.merge(record for path in files for record in store.read(path).records)
    out.print(f"{added} new records")


def _prune(database: Database, targets: Sequence[Target]) -> None:
    """Keep the best record and the default's, of the newest kernel revision of each device."""
    for target in targets:
        path = database.path(target.name)
        if not path.exists():
            continue
        with store.edit(path) as kept:
            before = len(kept)
            kept[:] = needed(kept)
            after = len(kept)
        out.print(f"{path}: {before - after} of {before} records dropped")


def register(app: typer.Typer) -> None:
    """Add the commands to the command line."""
    app.command()(tune)
    app.command()(targets)
    app.command()(records)
