"""A CUDA kernel library and its manifest: which kernels it holds, how each was tiled, and how to load it without a
compiler.
"""

import ctypes
import functools
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from swacompile.schedules.cuda.spec import Config, Features, KernelSpec, MmaConfig, WgmmaConfig

MANIFEST_VERSION = 1
CUDA_RUNTIME = "libcudart.so.13"
_CONFIGS: dict[str, type[WgmmaConfig] | type[MmaConfig]] = {"wgmma": WgmmaConfig, "mma": MmaConfig}
_DEVICE_ATTRIBUTES = {"multiprocessors": 16, "l2_bytes": 38, "major": 75, "minor": 76}


class CudaRuntimeError(Exception):
    """A kernel library cannot run here; the message says what is missing or does not fit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """One attention kernel of a library."""

    spec: KernelSpec
    config: Config

    @property
    def family(self) -> str:
        return "wgmma" if isinstance(self.config, WgmmaConfig) else "mma"

    def to_json(self) -> dict[str, Any]:
        return {"family": self.family, "spec": asdict(self.spec), "config": asdict(self.config)}

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> "Kernel":
        spec = dict(record["spec"])
        spec["features"] = Features(**spec["features"])
        return cls(spec=KernelSpec(**spec), config=_CONFIGS[record["family"]](**record["config"]))


def manifest_path(library: Path) -> Path:
    return library.with_suffix(".json")


def write_manifest(library: Path, arch: str, kernels: tuple[Kernel, ...]) -> None:
    record = {"version": MANIFEST_VERSION, "arch": arch, "kernels": [kernel.to_json() for kernel in kernels]}
    manifest_path(library).write_text(json.dumps(record, indent=1) + "\n")


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """What a launch needs to know of a GPU."""

    multiprocessors: int
    l2_bytes: int
    major: int
    minor: int


@functools.cache
def device(index: int) -> Device:
    """Raises CudaRuntimeError where there is no such GPU or no driver."""
    runtime = ctypes.CDLL(CUDA_RUNTIME)
    values = {}
    for name, attribute in _DEVICE_ATTRIBUTES.items():
        value = ctypes.c_int()
        code = runtime.cudaDeviceGetAttribute(ctypes.byref(value), attribute, index)
        if code:
            raise CudaRuntimeError(f"GPU {index} does not answer (CUDA error {code}): is there one, and its driver?")
        values[name] = value.value
    return Device(**values)


class CudaLibrary:
    """An open kernel library.

    Loads libtvm_runtime.so and libtvm_runtime_cuda.so from `runtime`, or TVM's own where it is None.
    """

    def __init__(self, path: Path, *, runtime: Path | None = None) -> None:
        record = json.loads(manifest_path(path).read_text())
        if record["version"] != MANIFEST_VERSION:
            raise CudaRuntimeError(
                f"{manifest_path(path)} has version {record['version']}, this reads {MANIFEST_VERSION}: rebuild it"
            )
        self.arch: str = record["arch"]
        self.kernels = tuple(Kernel.from_json(entry) for entry in record["kernels"])
        _load_runtime(runtime)
        import tvm_ffi

        self._module = tvm_ffi.load_module(str(path.absolute()))

    def function(self, name: str) -> Any:
        """Raises CudaRuntimeError where the library lacks it."""
        found = self._module.get_function(name) if self._module.implements_function(name) else None
        if found is None:
            raise CudaRuntimeError(
                f"the kernel library for {self.arch} holds no function {name}: rebuild it with that kernel"
            )
        return found

    def find(self, spec: KernelSpec) -> Kernel:
        for kernel in self.kernels:
            if kernel.spec == spec:
                return kernel
        raise CudaRuntimeError(f"the kernel library for {self.arch} holds no kernel {spec.symbol}: build it first")

    def check_device(self, index: int) -> Device:
        """Raises CudaRuntimeError where the library's machine code is not for that GPU."""
        found = device(index)
        number = self.arch.removeprefix("sm_")
        exact = number.endswith("a")
        major, minor = int(number.rstrip("a")[:-1]), int(number.rstrip("a")[-1])
        fits = found.major == major and (found.minor == minor if exact else found.minor >= minor)
        if not fits:
            raise CudaRuntimeError(
                f"the kernel library is for {self.arch}, GPU {index} is sm_{found.major}{found.minor}: build one for it"
            )
        return found


@functools.cache
def _load_runtime(folder: Path | None) -> None:
    import tvm_ffi

    if folder is None:
        import tvm

        folder = Path(tvm.__file__).parent / "lib"
    ffi = Path(tvm_ffi.__file__).parent / "lib" / "libtvm_ffi.so"
    libraries = [
        CUDA_RUNTIME,
        *([str(ffi)] if ffi.exists() else []),
        str(folder / "libtvm_runtime.so"),
        str(folder / "libtvm_runtime_cuda.so"),
    ]
    for library in libraries:
        try:
            ctypes.CDLL(library, ctypes.RTLD_GLOBAL)
        except OSError as error:
            raise CudaRuntimeError(
                f"cannot load {library}: {error}. "
                "CUDA kernels need a driver, CUDA 13's runtime and TVM's two runtime libraries"
            ) from error
