"""CUDA architectures that kernels are built for: limits a tile must respect, and the families that run there."""

from dataclasses import dataclass

RESERVED_PER_BLOCK = 1024
"""Bytes of shared memory that the driver takes of each thread block (CUDA C++ programming guide)."""


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

    def holds(self, shared_bytes: int, blocks_per_sm: int) -> bool:
        """Whether so many thread blocks of this size run on one multiprocessor at a time."""
        each = shared_bytes + RESERVED_PER_BLOCK
        return shared_bytes <= self.shared_per_block and each * blocks_per_sm <= self.shared_per_sm

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
