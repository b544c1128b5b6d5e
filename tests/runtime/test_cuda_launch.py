from types import SimpleNamespace

import pytest

from swacompile.runtime.cuda.launch import UNBOUNDED, Numbers, _heads_per_wave
from swacompile.runtime.cuda.library import Device, Kernel
from swacompile.schedules.cuda.spec import KernelSpec, WgmmaConfig

KERNEL = Kernel(
    spec=KernelSpec(dtype="bfloat16", head_size=128, value_size=128), config=WgmmaConfig(keys_per_tile=64, consumers=1)
)
CACHE = 50 * 2**20


@pytest.mark.parametrize(
    ("pairs", "keys", "left", "expected"),
    [
        (8, 16384, 4095, 8),  # 2 MiB a window: twelve fit in half of the cache
        (24, 4096, 4095, 24),  # all of them in twice that
        (32, 4096, 4095, 11),  # three even waves
        (64, 4096, 4095, 11),
        (32, 16384, UNBOUNDED, 3),
        (6, 16384, UNBOUNDED, 6),
        (5, 1 << 20, UNBOUNDED, 1),  # none fits
    ],
)
def test_waves_are_even_and_fit_the_cache(pairs: int, keys: int, left: int, expected: int) -> None:
    key = SimpleNamespace(shape=(1, pairs, keys, 128))
    device = Device(multiprocessors=132, l2_bytes=CACHE, major=9, minor=0)
    assert _heads_per_wave(KERNEL, None, key, Numbers(left=left, right=0), device) == expected
