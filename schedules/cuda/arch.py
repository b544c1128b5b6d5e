"""CUDA architectures that kernels are built for: limits a tile must respect, and the families that run there."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class CudaArch:
    name: str
    """As nvcc spells it."""
    families: tuple[str, ...]
    """Best first."""
    shared_per_block: int
    """Bytes a thread block may use, with the opt-in above 48 KiB (CUDA C++ programming guide, table of compute
    capabilities).
    """
    shared_per_sm: int

    @property
    def nvcc_flags(self) -> tuple[str, ...]:
        # -arch=sm_90a would also assemble for plain sm_90 with some releases of nvcc, which refuses wgmma.
        number = self.name.removeprefix("sm_")
        return (f"-gencode=arch=compute_{number},code=sm_{number}",)


KIB = 1024
CUDA_ARCHS = {
    arch.name: arch
    for arch in (
        CudaArch(name="sm_80", families=("mma",), shared_per_block=163 * KIB, shared_per_sm=164 * KIB),
        CudaArch(name="sm_86", families=("mma",), shared_per_block=99 * KIB, shared_per_sm=100 * KIB),
        CudaArch(name="sm_89", families=("mma",), shared_per_block=99 * KIB, shared_per_sm=100 * KIB),
        CudaArch(name="sm_90a", families=("wgmma", "mma"), shared_per_block=227 * KIB, shared_per_sm=228 * KIB),
        CudaArch(name="sm_100a", families=("mma",), shared_per_block=227 * KIB, shared_per_sm=228 * KIB),
        CudaArch(name="sm_120", families=("mma",), shared_per_block=99 * KIB, shared_per_sm=100 * KIB),
    )
}
