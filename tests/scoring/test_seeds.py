"""Intervals of a relative reduction over seeds and recordings, against direct simulation of training and test sets."""

import math

import numpy as np
import pytest

from bestrq.scoring.seeds import SeedErrors, mean_squares, relative_reduction
from bestrq.scoring.student import student_quantile
from common.errors import UserError

# Seeds, recordings, deviation of the logarithm of a seed's rate.
SITUATIONS = {
    "seeds without effect": (3, 300, 0.0),
    "seeds and recordings": (3, 300, 0.02),
    "seeds dominate": (3, 1000, 0.06),
    "few recordings": (3, 40, 0.02),
    "five seeds": (5, 300, 0.03),
}
TRUTH = 0.15
EXPERIMENTS = 300


def simulate(generator: np.random.Generator, seeds: int, recordings: int, deviation: float) -> SeedErrors:
    """Errors of two recipes: the rate depends on the recording, on the seed, and on the system for each recording."""
    lengths = generator.lognormal(math.log(40), 0.5, recordings).astype(int) + 1
    rates = 0.3 * np.exp(generator.normal(0, 0.4, recordings))
    factor = np.exp(generator.normal(-(0.15**2) / 2, 0.15, recordings))  # of mean 1
    errors = [
        [
            generator.poisson(lengths * rates * scale * np.exp(generator.normal(-(deviation**2) / 2, deviation)))
            for _ in range(seeds)
        ]
        for scale in (1.0, (1 - TRUTH) * factor)
    ]
    return SeedErrors(np.array(errors[0]), np.array(errors[1]), lengths)


@pytest.mark.parametrize("situation", SITUATIONS)
def test_intervals_cover_the_reduction_of_the_recipes_in_92_to_98_percent_of_300_simulations(situation: str) -> None:
    generator = np.random.default_rng(0)
    found = [relative_reduction([simulate(generator, *SITUATIONS[situation])], 100) for _ in range(EXPERIMENTS)]
    assert 0.92 <= np.mean([result.low <= TRUTH <= result.high for result in found]) <= 0.985
    assert np.mean([result.value for result in found]) == pytest.approx(TRUTH, abs=0.01)


def test_the_interval_of_two_languages_covers_the_reduction_of_their_mean_rates() -> None:
    generator = np.random.default_rng(1)
    found = [
        relative_reduction([simulate(generator, 3, 300, 0.03), simulate(generator, 3, 100, 0.05)], 100)
        for _ in range(EXPERIMENTS)
    ]
    assert 0.92 <= np.mean([result.low <= TRUTH <= result.high for result in found]) <= 0.985


def test_the_half_width_is_that_of_the_spread_over_simulated_experiments() -> None:
    """With many seeds, the interval is 1.96 standard deviations of the estimate over repeated experiments."""
    generator = np.random.default_rng(2)
    found = [relative_reduction([simulate(generator, 30, 200, 0.05)], 100) for _ in range(200)]
    spread = np.std([math.log(1 - result.value) for result in found])
    half_widths = [(math.log(1 - result.low) - math.log(1 - result.high)) / 2 for result in found]
    assert np.mean(half_widths) == pytest.approx(1.96 * spread, rel=0.15)


def test_mean_squares_are_unbiased_for_the_variances_of_seeds_recordings_and_cells() -> None:
    generator = np.random.default_rng(3)
    seeds, recordings = 4, 25
    found = np.mean(
        [
            mean_squares(
                generator.normal(0, 0.5, (seeds, 1))
                + generator.normal(0, 2.0, (1, recordings))
                + generator.normal(0, 1.0, (seeds, recordings))
            )
            for _ in range(3000)
        ],
        axis=0,
    )
    assert found == pytest.approx([recordings * 0.25 + 1, seeds * 4 + 1, 1], rel=0.05)


def test_the_bootstrap_equals_a_plain_loop_over_resampled_seeds_and_recordings() -> None:
    errors = simulate(np.random.default_rng(4), 3, 30, 0.05)
    result = relative_reduction([errors], num_resamples=20_000)
    generator = np.random.default_rng(5)
    reductions = []
    for _ in range(20_000):
        seeds = generator.integers(0, 3, 2)
        recordings = generator.integers(0, 30, 30)
        first, second = (table[seeds][:, recordings].sum() for table in (errors.baseline, errors.system))
        reductions.append(1 - second / first)
    expected = np.quantile(reductions, [0.025, 0.975])
    assert [result.bootstrap_low, result.bootstrap_high] == pytest.approx(expected, abs=0.01)


def test_languages_have_equal_weight_and_the_value_is_of_their_mean_rates() -> None:
    few = SeedErrors(np.array([[4, 4]] * 2), np.array([[2, 2]] * 2), np.array([10, 10]))  # 40 % to 20 %
    many = SeedErrors(np.full((2, 100), 2), np.full((2, 100), 2), np.full(100, 10))  # 20 % to 20 %
    assert relative_reduction([few, many]).value == pytest.approx(1 - 0.2 / 0.3)
    assert relative_reduction([few]).value == pytest.approx(0.5)


def test_a_shared_seed_effect_cancels_and_one_seed_has_no_interval() -> None:
    """Seeds are paired: a seed that is bad for both systems does not widen the interval."""
    errors = simulate(np.random.default_rng(6), 3, 200, 0.0)
    scale = np.array([[1], [2], [3]])
    shared = SeedErrors(errors.baseline * scale, errors.system * scale, errors.lengths)
    separate = SeedErrors(errors.baseline * scale, errors.system * scale[::-1], errors.lengths)
    widths = [result.high - result.low for result in map(relative_reduction, ([shared], [separate]))]
    assert widths[1] > 5 * widths[0]
    single = relative_reduction([SeedErrors(errors.baseline[:1], errors.system[:1], errors.lengths)])
    assert math.isnan(single.low) and single.summary()["low"] is None and single.seeds == 1


def test_quantiles_of_student_are_those_of_published_tables() -> None:
    for freedom, quantile in {1: 12.706, 2.9: 4.303, 6: 2.447, 7: 2.365, 10: 2.228, 30: 2.042, math.inf: 1.960}.items():
        assert student_quantile(freedom) == pytest.approx(quantile, rel=4e-3), freedom
    assert math.isnan(student_quantile(math.nan))


def test_systems_with_other_seeds_or_recordings_are_refused() -> None:
    with pytest.raises(UserError, match="same number of seeds"):
        SeedErrors(np.ones((3, 5)), np.ones((2, 5)), np.ones(5))
    with pytest.raises(UserError, match="baseline has no errors"):
        SeedErrors(np.zeros((3, 5)), np.ones((3, 5)), np.ones(5))
    with pytest.raises(UserError, match="no results"):
        relative_reduction([])
