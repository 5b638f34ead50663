"""Quantile of Student's t for 95 % intervals from few values."""

import math

NORMAL = 1.959964
"""quantile 0.975 of the normal distribution"""
_TABLE = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447}


def student_quantile(freedom: float) -> float:
    """Quantile 0.975 of Student's t, to 0.4 %; NaN for NaN.

    Below 7, degrees of freedom are rounded down, to at least 1. From 7 on: Abramowitz and Stegun 1964, 26.7.5.
    """
    if math.isnan(freedom):
        return math.nan
    if freedom < 7:
        return _TABLE[max(int(freedom + 1e-9), 1)]
    z = NORMAL
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
