"""Names of the kernels that run beside an attention kernel, for a launcher that has no TVM compiler."""

from swacompile.schedules.cuda.spec import DTYPES


def combine_symbol(dtype: str, value_size: int, *, sinks: bool, lse: bool) -> str:
    return "_".join(
        ["swa_combine", DTYPES[dtype], f"v{value_size}", *(["sinks"] if sinks else []), *(["lse"] if lse else [])]
    )


def value_sum_symbol(dtype: str, value_size: int, *, key_padding: bool) -> str:
    return "_".join(["swa_value_sum", DTYPES[dtype], f"v{value_size}", *(["key_padding"] if key_padding else [])])
