"""The command `bench`: options in, calls of swacompile.report, tables out."""

import json
import logging
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from swacompile.cli_tuning import Folder, records_folder
from swacompile.errors import ArgumentError, OutputError, TargetError
from swacompile.target import Target, TargetClass, cuda_target, host_targets, target_named
from swacompile.tuning.database import Database
from swacompile.workload import DType

if TYPE_CHECKING:
    from swacompile.report import bench_cuda
    from swacompile.report.bench_cpu import Row
    from swacompile.report.cpu_cases import Case
    from swacompile.report.cpu_contenders import Contender

CPU = "cpu"
CUDA = "cuda"
CUDA_NAMES = (CUDA, "nvidia/")
"""How the names of CUDA targets begin."""

out, err = Console(width=10_000 if not sys.stdout.isatty() else None), Console(stderr=True)

What = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="[MODEL|WORKLOAD|SET]...",
        help="Models, for all their attentions with a window; workloads such as f32-d64-v64-g4-w512-n2048; or the sets that "
        "docs/performance.md shows: prefill, short, decode.",
    ),
]


def bench(
    what: What = None,
    target_name: Annotated[
        str,
        typer.Option(
            "--target",
            help="cpu for the best that this machine runs, a CPU target's name, or cuda (nvidia/nvidia-h100).",
        ),
    ] = CPU,
    threads: Annotated[
        list[int] | None, typer.Option(min=1, help="Threads of every contender; may be given again. Default: 1.")
    ] = None,
    seconds: Annotated[
        float, typer.Option(min=0, help="Time for each case, beyond three rounds of every contender.")
    ] = 4.0,
    length: Annotated[
        int | None, typer.Option(min=1, help="Keys of the cases of models and workloads, instead of their own.")
    ] = None,
    contenders: Annotated[
        list[str] | None,
        typer.Option("--contender", help="Only peers whose names hold this text; may be given again. 'none' for none."),
    ] = None,
    as_document: Annotated[bool, typer.Option("--json", help="Print a JSON document instead of tables.")] = False,
    plot: Annotated[
        Path | None,
        typer.Option(help="Write a picture, .svg or .png, of time against length: MHA, GQA, MQA and a sliding window."),
    ] = None,
    folder: Folder = None,
) -> None:
    """Time our kernels beside torch's and ONNX Runtime's ways to compute the same attention, paired in one run.

    Example: `swacompile bench f32-d64-v64-g1-w512-n4096 --threads 1 --threads 2`
    """
    if plot is not None:
        _check_plot(plot)
    if target_name.startswith(CUDA_NAMES):
        if plot is not None:
            raise ArgumentError(f"--plot draws CPU kernels: expected no --target {target_name} beside it")
        _bench_cuda(what or [], target_name, length, contenders, folder, as_document=as_document)
        return
    if not what and plot is None:
        raise ArgumentError("nothing to time: give a model, a workload, a set (prefill, short, decode), or --plot")
    target = _cpu_target(target_name)
    database = Database(folders=(records_folder(folder),))
    cases = _cases(what or [], length)
    if cases:
        _bench_cpu(cases, target, database, threads or [1], seconds, _chosen(contenders), as_document=as_document)
    if plot is not None:
        _plot(plot, target, database, max(threads or [1]), min(seconds, 1.0))


def _bench_cpu(
    cases: "Sequence[Case]", target: Target, database: Database, threads: Sequence[int], seconds: float,
    contenders: "Sequence[Contender]", *, as_document: bool,
) -> None:  # fmt: skip
    from swacompile.report import bench_cpu, cpu_table

    logging.getLogger("torch").setLevel(logging.ERROR)  # its compiler warns of what becomes a row of the table
    rows: list[Row] = []
    with err.status("timing") as status:
        timed = bench_cpu.bench(
            cases, threads=threads, seconds=seconds, contenders=contenders, target=target, database=database
        )
        for row in timed:
            rows.append(row)
            status.update(f"{row.case}, {_threads(row.threads)}: {row.contender}")
    machine = bench_cpu.Machine.here(target)
    if as_document:
        sys.stdout.write(bench_cpu.to_json(machine, rows) + "\n")
        return
    versions = ", ".join(f"{name} {number}" for name, number in machine.versions)
    _print(f"{machine.processor}, {machine.cores} cores, {machine.target}; {versions}; {machine.day}\n")
    _print(cpu_table.details(rows) + "\n")
    for line in dict.fromkeys(f"tuning {row.tuning}" for row in rows if row.tuning):
        _print(line)
    for group in cpu_table.by_case(rows):
        best = cpu_table.best_peer(group)
        shown = f"{best.contender}, takes {best.ratio:.2f} times as long" if best else "none was timed"
        first = next(iter(group.values()))
        _print(
            f"{first.case}, {_threads(first.threads)}: the fastest peer, {shown}" if best else f"{first.case}: {shown}"
        )


def _plot(plot: Path, target: Target, database: Database, threads: int, seconds: float) -> None:
    from swacompile.report import length_plot

    with err.status(f"timing for {plot}"):
        series = length_plot.measure(threads=threads, seconds=seconds, target=target, database=database)
    title = f"{length_plot.HEADS} heads, D {length_plot.HEAD_SIZE}, {_threads(threads)}, {target.description}"
    try:
        plot.write_bytes(length_plot.written(series, title=title, suffix=plot.suffix))
    except OSError as error:
        raise OutputError(f"{plot}: could not be written: {error.strerror}") from error
    err.print(f"wrote {plot}", soft_wrap=True)


def _check_plot(plot: Path) -> None:
    """Before anything is measured."""
    from swacompile.report import length_plot

    length_plot.require_format(plot.suffix)
    if not plot.parent.is_dir():
        raise OutputError(f"{plot}: the folder {plot.parent} does not exist. Create it, or name another place.")


def _cases(what: Sequence[str], length: int | None) -> "tuple[Case, ...]":
    from swacompile.report.cpu_cases import cases_named

    return tuple(dict.fromkeys(case for text in what for case in cases_named(text, length=length)))


def _chosen(names: Sequence[str] | None) -> "tuple[Contender, ...]":
    from swacompile.report.cpu_contenders import PEERS

    if names is None:
        return PEERS
    if list(names) == ["none"]:
        return ()
    for name in names:
        if not any(name.lower() in peer.name.lower() for peer in PEERS):
            raise ArgumentError(f"no contender {name!r}: expected a part of {', '.join(peer.name for peer in PEERS)}")
    return tuple(peer for peer in PEERS if any(name.lower() in peer.name.lower() for name in names))


def _cpu_target(name: str) -> Target:
    """Raises TargetError for a target that this machine does not run."""
    if name == CPU:
        return host_targets()[0]
    target = target_named(name)
    if target.target_class is not TargetClass.CPU or target not in host_targets():
        runs = ", ".join(target.name for target in host_targets())
        raise TargetError(f"{name}: expected a target that this machine runs, which are {runs}")
    return target


def _bench_cuda(
    what: Sequence[str], name: str, length: int | None, contenders: Sequence[str] | None, folder: Path | None,
    *, as_document: bool,
) -> None:  # fmt: skip
    """Raises TargetError where there is no device that the kernels are timed on."""
    from swacompile.report import bench_cuda

    cases = tuple(case for text in what for case in _cuda_cases(text, length)) or bench_cuda.CASES
    device, target = _cuda_device(name)
    database = Database(folders=(records_folder(folder),))
    with tempfile.TemporaryDirectory(prefix="swacompile-") as built, err.status("building kernels") as status:
        origins = bench_cuda.build_libraries(Path(built), cases, target, database, device=device)
        ceilings = bench_cuda.measure_ceilings()
        rows = []
        for row in bench_cuda.run(Path(built), cases, ceilings, contenders=contenders, origins=origins):
            rows.append(row)
            status.update(f"{row.case}: {row.peer}")
    if as_document:
        about = {"version": 2, "device": device, "target": target.name, "ceilings": asdict(ceilings)}
        sys.stdout.write(json.dumps(about | {"rows": [_finite(row) for row in rows]}, indent=1) + "\n")
        return
    _print(f"{device}, {target.tag or target.name}\n")
    _print("\n".join(_cuda_lines(rows)) + "\n")
    for line in dict.fromkeys(f"tuning {row.tuning}" for row in rows if row.tuning):
        _print(line)


def _cuda_lines(rows: "Sequence[bench_cuda.Row]") -> Iterator[str]:
    yield "| case | contender | ms | times ours | TFLOP/s | of the floor |"
    yield "|---|---|---|---|---|---|"
    for row in rows:
        figures = f"{row.milliseconds:.3f} | {row.ratio:.2f} | {row.tflops:.1f} | {100 * row.floor_share:.0f} %"
        yield f"| {row.case} | {row.peer} | {row.failure + ' | | |' if row.failure else figures} |"


def _finite(row: "bench_cuda.Row") -> dict[str, object]:
    """JSON has no NaN."""
    return {name: None if value != value else value for name, value in asdict(row).items()}


def _cuda_device(name: str) -> tuple[str, Target]:
    """The first device's name, and its row or the one that `name` names, whose kernels must run there."""
    try:
        import torch
    except ModuleNotFoundError as error:
        raise TargetError(
            f"--target {name}: devices and peers are reached through torch, which is not installed."
        ) from error
    if not torch.cuda.is_available():
        raise TargetError(
            f"--target {name}: expected a CUDA device that torch {torch.__version__} can use, found none. "
            "Install a driver and a torch built for CUDA, or name a CPU target."
        )
    device, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    found = cuda_target(device, capability)
    if name == CUDA:
        return device, found
    target = target_named(name)
    if target.cuda is None or target.cuda.capability != capability:
        arch = target.cuda.arch if target.cuda else "no GPU"
        raise TargetError(
            f"--target {name}: its kernels are built for {arch}, the device is {device}: name {found.tag}"
        )
    return device, target


def _cuda_cases(text: str, length: int | None) -> "Iterator[bench_cuda.Case]":
    from swacompile.report import bench_cuda

    named = [case for case in bench_cuda.CASES if case.name == text]
    if named:
        yield from named
        return
    for case in _cases([text], length):
        if case.softcap or case.columns != case.head_size:
            raise ArgumentError(f"{text}: the CUDA benchmark times neither softcap nor value sizes of their own")
        yield bench_cuda.Case(
            name=str(replace(case.workload, dtype=DType.BF16)),
            batch=1,
            heads=case.heads,
            kv_heads=case.kv_heads,
            head_size=case.head_size,
            keys=case.keys,
            left=case.left,
            right=case.right,
            queries=case.queries,
            sinks=case.sinks,
        )


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"


def _print(text: str) -> None:
    out.print(text, markup=False, highlight=False, soft_wrap=True)


def register(app: typer.Typer) -> None:
    """Add the command to the command line."""
    app.command()(bench)
