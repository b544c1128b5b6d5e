"""The table of what ptxas made of the default CUDA kernels: `python -m swacompile.report.cuda_table docs/cuda_kernels.md`.

Builds them for every architecture, which needs nvcc and takes about a minute, and replaces the table between two marks.
"""

import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from swacompile.kernels.build_cuda import build_kernels
from swacompile.runtime.cuda.library import Kernel
from swacompile.schedules.cuda.arch import CUDA_ARCHS, CudaArch
from swacompile.schedules.cuda.choose import Shape, choose
from swacompile.schedules.cuda.spec import Features, KernelSpec, WgmmaConfig

BEGIN, END = "<!-- ptxas table: begin -->", "<!-- ptxas table: end -->"
HEAD = "| architecture | kernel | tile (queries x keys) | threads | registers | spilled bytes | shared bytes |\n|---|---|---|---|---|---|---|"
HEAD_SIZES = (32, 64, 80, 96, 128, 192, 256)


def default_kernels(arch: CudaArch) -> Iterator[Kernel]:
    """A plain causal kernel for each head size, and a decoding one."""
    for size in HEAD_SIZES:
        yield _kernel(arch, size, Features())
    for size in (64, 128):
        yield _kernel(arch, size, Features(split=True))


def _kernel(arch: CudaArch, size: int, features: Features) -> Kernel:
    spec = KernelSpec(dtype="bfloat16", head_size=size, value_size=size, features=features)
    return Kernel(spec=spec, config=choose(spec, arch, Shape(group=4)))


def rows(arch: CudaArch, folder: Path) -> Iterator[str]:
    """One line of Markdown a kernel."""
    kernels = tuple(default_kernels(arch))
    built = build_kernels(kernels, arch, folder / f"{arch.name}.so")
    reports = {report.kernel: report for report in built.reports}
    for kernel in kernels:
        report, config = reports[f"{kernel.spec.symbol}_kernel"], kernel.config
        registers = str(report.registers)
        if isinstance(config, WgmmaConfig):
            registers += " ({} producer, {} consumer)".format(*config.registers)
        cells = (
            arch.name,
            f"{kernel.family} {kernel.spec.symbol}",
            f"{config.rows} x {config.keys_per_tile}",
            config.threads,
            registers,
            report.spill_bytes,
            config.shared_bytes(kernel.spec),
        )
        yield "| " + " | ".join(map(str, cells)) + " |"


def replace_table(text: str, table: str) -> str:
    """`text` with `table` between the marks. Raises ValueError where a mark is missing."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"expected the lines '{BEGIN}' and '{END}' around the table, found none: add them")
    return f"{before}{BEGIN}\n{table}\n{END}{after}"


def main() -> None:
    document = Path(sys.argv[1])
    with tempfile.TemporaryDirectory() as folder:
        lines = [row for arch in CUDA_ARCHS.values() for row in rows(arch, Path(folder))]
    document.write_text(replace_table(document.read_text(), "\n".join([HEAD, *lines])))


if __name__ == "__main__":
    main()
