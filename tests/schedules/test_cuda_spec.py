import pytest

from swacompile.schedules.cuda.arch import CUDA_ARCHS
from swacompile.schedules.cuda.choose import RULES, Shape, choose
from swacompile.schedules.cuda.spec import Features, KernelSpec, MmaConfig, WgmmaConfig


def spec(size: int, **features: bool) -> KernelSpec:
    return KernelSpec(dtype="bfloat16", head_size=size, value_size=size, features=Features(**features))


def test_symbols_tell_kernels_apart() -> None:
    assert spec(64).symbol == "swa_bf16_d64_v64"
    assert spec(64, sinks=True, lse=True).symbol == "swa_bf16_d64_v64_sinks_lse"
    assert KernelSpec(dtype="float32", head_size=64, value_size=32).symbol == "swa_f32_d64_v32"
    assert KernelSpec(dtype="float32", head_size=64, value_size=32, tf32=True).symbol == "swa_tf32_d64_v32"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": "float64", "head_size": 64, "value_size": 64}, "take float16, bfloat16, float32, not float64"),
        (
            {"dtype": "float16", "head_size": 64, "value_size": 64, "tf32": True},
            "a way to multiply float32, not float16",
        ),
        (
            {"dtype": "float16", "head_size": 60, "value_size": 64},
            "head_size must be a multiple of 8 from 8 to 256, not 60",
        ),
        (
            {"dtype": "float16", "head_size": 64, "value_size": 264},
            "value_size must be a multiple of 8 from 8 to 256, not 264",
        ),
    ],
)
def test_a_spec_refuses_what_no_kernel_does(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        KernelSpec(**arguments)  # type: ignore[arg-type]


def test_zeroed_refuses_what_its_sum_over_all_values_cannot_see() -> None:
    with pytest.raises(ValueError, match="not segments, split"):
        Features(zeroed=True, segments=True, split=True)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lambda: WgmmaConfig(keys_per_tile=72), "multiple of 16 up to 256"),
        (lambda: WgmmaConfig(keys_per_tile=64, pack=3), "power of two up to 64"),
        (lambda: WgmmaConfig(keys_per_tile=64, consumers=4), "must be 1, 2 or 3"),
        (lambda: WgmmaConfig(keys_per_tile=64, tail_keys=64), "multiple of 16 below keys_per_tile=64, not 64"),
        (lambda: MmaConfig(keys_per_tile=24), "multiple of 16"),
        (lambda: MmaConfig(keys_per_tile=64, stages=1), "at least 2"),
        (lambda: MmaConfig(keys_per_tile=64, pack=128), "up to 64 rows"),
    ],
)
def test_a_config_refuses_what_the_instructions_cannot_do(config: object, message: str) -> None:
    assert callable(config)
    with pytest.raises(ValueError, match=message):
        config()


@pytest.mark.parametrize("consumers", [1, 2, 3])
@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_registers_fit_the_multiprocessor(consumers: int, blocks: int) -> None:
    config = WgmmaConfig(keys_per_tile=64, consumers=consumers, blocks_per_sm=blocks)
    producer, consumer = config.registers
    assert producer % 8 == consumer % 8 == 0
    assert 128 * (producer + consumers * consumer) * blocks <= 65536


@pytest.mark.parametrize("size", [32, 64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("arch", CUDA_ARCHS)
@pytest.mark.parametrize("features", [{}, {"split": True}, {"bias": True, "segments": True}, {"zeroed": True}])
def test_every_kernel_has_tiles_on_every_architecture(size: int, arch: str, features: dict[str, bool]) -> None:
    target = CUDA_ARCHS[arch]
    for shape in (Shape(), Shape(group=8, band=128), Shape(group=5), Shape(group=48)):
        config = choose(spec(size, **features), target, shape)
        assert target.holds(config.shared_bytes(spec(size, **features)), config.blocks_per_sm)
        assert isinstance(config, WgmmaConfig) == ("wgmma" in target.families)


@pytest.mark.parametrize("size", [32, 64, 80, 96, 128, 192, 256])
@pytest.mark.parametrize("arch", CUDA_ARCHS)
def test_float32_goes_to_the_family_that_multiplies_tf32(size: int, arch: str) -> None:
    for features in (Features(), Features(split=True), Features(bias=True, segments=True)):
        single = KernelSpec(dtype="float32", head_size=size, value_size=size, features=features)
        config = choose(single, CUDA_ARCHS[arch], Shape(group=4))
        assert isinstance(config, MmaConfig)
        assert config.shared_bytes(single) <= CUDA_ARCHS[arch].shared_per_block
        assert single.element_bytes == 4


@pytest.mark.parametrize(
    ("arch", "keys"), [("sm_80", 64), ("sm_86", 48), ("sm_89", 48), ("sm_100a", 64), ("sm_120", 48)]
)
def test_blocks_that_shall_share_a_multiprocessor_fit(arch: str, keys: int) -> None:
    config, target = choose(spec(64), CUDA_ARCHS[arch], Shape()), CUDA_ARCHS[arch]
    assert (config.keys_per_tile, config.blocks_per_sm) == (keys, 2)
    assert 2 * (config.shared_bytes(spec(64)) + 1024) <= target.shared_per_sm


def test_a_block_alone_may_take_what_two_may_not() -> None:
    arch = CUDA_ARCHS["sm_86"]
    assert arch.holds(99 * 1024, 1) and not arch.holds(99 * 1024 + 16, 1)
    assert arch.holds(49 * 1024, 2) and not arch.holds(49 * 1024 + 16, 2)


def test_a_short_band_of_grouped_heads_is_packed() -> None:
    config = choose(spec(64), CUDA_ARCHS["sm_90a"], Shape(group=8, band=128))
    assert (config.pack, config.positions) == (8, 16)


def test_rules_that_do_not_apply_say_so() -> None:
    plain, split = spec(64), spec(64, split=True)
    assert RULES["wgmma"][0](plain, Shape()) is None
    assert RULES["wgmma"][0](split, Shape()) is not None
    assert RULES["mma"][0](plain, Shape()) is None
