"""The assignment against all permutations, and against the optimality conditions where there are too many."""

import itertools

import numpy as np
import pytest

from bestrq.pretraining.matching import match


def total(similarity: np.ndarray, columns) -> float:
    return float(similarity[np.arange(len(similarity)), columns].sum())


@pytest.mark.parametrize("size", range(7))
@pytest.mark.parametrize("values", ["normal", "ties", "negative"])
def test_no_permutation_has_a_larger_sum(size: int, values: str) -> None:
    generator = np.random.default_rng(size)
    for _ in range(20):
        similarity = {
            "normal": lambda: generator.normal(size=(size, size)),
            "ties": lambda: generator.integers(0, 3, size=(size, size)).astype(float),
            "negative": lambda: -generator.random((size, size)) - 5,
        }[values]()
        columns = match(similarity)
        assert sorted(columns.tolist()) == list(range(size))
        best = max(total(similarity, list(order)) for order in itertools.permutations(range(size)))
        assert total(similarity, columns) == pytest.approx(best, abs=1e-9)


def test_a_greedy_choice_is_undone_where_it_costs_more_elsewhere() -> None:
    """Row 0 prefers column 0, but row 1 loses more without it."""
    assert match(np.array([[1.0, 0.9], [0.8, 0.0]])).tolist() == [1, 0]


def test_shuffled_and_disturbed_codes_get_their_old_ids_back() -> None:
    generator = np.random.default_rng(3)
    codes = generator.normal(size=(300, 16))
    codes /= np.linalg.norm(codes, axis=1, keepdims=True)
    order = generator.permutation(300)
    disturbed = codes[order] + 0.03 * generator.normal(size=codes.shape)
    assert np.array_equal(order[match(codes @ disturbed.T)], np.arange(300))
