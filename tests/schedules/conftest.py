"""The full matrix of CUDA builds takes minutes and runs only when asked for: `pytest -m cuda_matrix`."""

import pytest

MATRIX = "cuda_matrix"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", f"{MATRIX}: builds CUDA kernels for every architecture, head size and feature (minutes)"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if MATRIX in str(config.option.markexpr):
        return
    for item in items:
        if item.get_closest_marker(MATRIX):
            item.add_marker(pytest.mark.skip(reason=f"takes minutes: pytest -m {MATRIX}"))
