"""`python -m tests.runtime.cuda_host FOLDER`: runs the cases on the stand-ins in FOLDER, prints what came out as JSON.

A process of its own: the operator is registered here as if CPU tensors were on a GPU.
"""

import ctypes
import json
import sys
from pathlib import Path

import numpy as np
import torch

from swacompile.runtime.torch_op.cuda_build import TVM_FFI
from tests.runtime.cases import BY_NAME, CASES, PLAIN, Case, error_of

STAND_INS = ("libcuda.so.1", "libtorch_cuda.so", "libcudart.so.13", "libtvm_runtime.so", "libtvm_runtime_cuda.so")
OPTIONAL = ("key_padding", "segments", "sinks", "bias", "alibi_slopes", "offset")
DECODE = PLAIN.but(name="decode", queries=1, keys=200, left=150, alignment="bottom_right")
RUN = (*(case for case in CASES if case.dtype == "float32"), DECODE)


def tensors(case: Case) -> dict[str, torch.Tensor]:
    made = {name: torch.from_numpy(np.array(array)) for name, array in case.operands.items()}
    if case.layout == "BSHD":
        made |= {name: made[name].transpose(1, 2) for name in ("query", "key", "value")}
    return made


def scattered(tensor: torch.Tensor) -> torch.Tensor:
    wide = torch.zeros([2 * extent + 1 for extent in tensor.shape], dtype=tensor.dtype)
    return wide[tuple(slice(1, None, 2) for _ in tensor.shape)].copy_(tensor)


def call(case: Case, given: dict[str, torch.Tensor]) -> torch.Tensor:
    output: torch.Tensor = torch.ops.swacompile.banded_attention(
        *(given.get(name) for name in ("query", "key", "value", *OPTIONAL)),
        scale=case.scale,
        softcap=case.softcap,
        left_window_size=case.left,
        right_window_size=case.right,
        bottom_right=case.alignment == "bottom_right",
        chunk_size=case.chunk_size,
        zeroed=case.kind == "zeroed",
        bshd_output=case.layout == "BSHD",
    )
    return output


def errors(case: Case, given: dict[str, torch.Tensor]) -> tuple[float, float]:
    """Distances to the reference, and to that of a window that is one key wider."""
    output = call(case, given)
    found = (output.transpose(1, 2) if case.layout == "BSHD" else output).numpy()
    return error_of(found, case), error_of(found, case.but(left=case.left + 1))


def message(case: Case, given: dict[str, torch.Tensor]) -> str:
    try:
        call(case, given)
    except RuntimeError as error:
        return str(error).splitlines()[0]
    return "no error"


def main() -> None:
    folder = Path(sys.argv[1])
    for name in (*STAND_INS, TVM_FFI):
        ctypes.CDLL(str(folder / name), ctypes.RTLD_GLOBAL)
    kernels = ctypes.CDLL(str(folder / "kernels.so"))
    torch.ops.load_library(folder / "operator.so")  # type: ignore[no-untyped-call]  # torch's
    operator = ctypes.CDLL(str(folder / "operator.so"))
    text = ctypes.create_string_buffer(2048)
    early = message(PLAIN, tensors(PLAIN))
    added = operator.swacompile_torch_add_cuda_kernels(
        str(folder / "kernels.so").encode(), str(folder).encode(), text, ctypes.c_size_t(2048)
    )
    assert added == 0, text.value
    found = {case.name: errors(case, tensors(case)) for case in RUN}
    everything = BY_NAME["everything"]
    strided = {name: scattered(tensor) for name, tensor in tensors(everything).items()}
    given, described = tensors(PLAIN), []
    for _ in range(200):
        output = call(PLAIN, given)
        described.append((kernels.stand_in_describes(), output.data_ptr()))
        del output  # its memory is free for the next
    far = PLAIN.but(offset=1 << 29)
    messages = {
        "early": early,
        "head size": message(PLAIN, {name: torch.ones(1, 1, 8, 12) for name in ("query", "key", "value")}),
        "scale": message(PLAIN.but(scale=-1.0), given),
        "offset": message(far.but(left=-1), tensors(far)),
        "closed": message(far.but(left=1 << 28), tensors(far)),
    }
    report = {
        "errors": found,
        "scattered": errors(everything, strided),
        "described": described,
        "messages": messages,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
