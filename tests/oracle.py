"""What an attention really sees, found without knowing how it is made: which outputs move when one token does."""

from collections.abc import Callable

import numpy as np

ROUNDING = 1e-6
Run = Callable[[np.ndarray], np.ndarray]


def seen_by(run: Run, tokens: np.ndarray) -> np.ndarray:
    """(queries, keys) booleans: whether output q moves when token k does, for a model of (batch, length, ...) tokens and outputs.

    A hidden key has weight exactly 0; what moves by less than ROUNDING is a sum over all scores that drops out again. The query's own token is
    also its query: where that is hidden from itself, this does not show it.
    """
    length = len(tokens)
    moved = np.repeat(tokens[None], length + 1, axis=0)
    rows = np.arange(length)
    moved[rows, rows] = -2 * tokens[::-1]
    found = run(moved).reshape(length + 1, length, -1)
    return (np.abs(found[:-1] - found[-1:]) > ROUNDING).any(axis=2).T


def band(left: int | None, right: int | None, length: int) -> np.ndarray:
    distance = np.arange(length)[None] - np.arange(length)[:, None]
    lower = -length if left is None else -left
    return (distance >= lower) & (distance <= (length if right is None else right))
