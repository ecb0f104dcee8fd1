"""Student's t without scipy: tail and quantiles."""

from __future__ import annotations

import math
from functools import lru_cache

SIGNIFICANT = 0.05  # p below which a difference is more than chance; intervals are those of 1 - this
POWER = 0.8  # chance that a real difference of the size called detectable is found
PRECISION = 1e-12  # relative, of a quantile


def _incomplete_beta(a: float, b: float, x: float) -> float:
    """Return the regularised incomplete beta function I_x(a, b) by its continued fraction (DLMF 8.17.22, Lentz's method)."""
    if x <= 0.0 or x >= 1.0:
        return float(x >= 1.0)
    if x > (a + 1) / (a + b + 2):  # there the fraction of the complement converges fast
        return 1.0 - _incomplete_beta(b, a, 1.0 - x)
    front = math.exp(a * math.log(x) + b * math.log1p(-x) + math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)) / a
    d = 1.0 / (1.0 - (a + b) * x / (a + 1))
    c, fraction, m, step = 1.0, d, 0, 0.0
    while abs(step - 1.0) > 1e-15 and m < 100_000:
        m += 1
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        step = 1.0
        for coefficient in (even, odd):
            d = 1.0 / (1.0 + coefficient * d)
            c = 1.0 + coefficient / c
            step *= c * d
        fraction *= step
    return front * fraction


def t_test(t: float, degrees: float) -> float:
    """Return the two-sided p of Student's t: the chance of a |t| at least as large where there is no difference."""
    return _incomplete_beta(degrees / 2, 0.5, degrees / (degrees + t * t))


@lru_cache(maxsize=4096)
def t_quantile(p: float, degrees: float) -> float:
    """Return the t whose two-sided p is `p`, by bisection."""
    low, high = 0.0, 1.0
    while t_test(high, degrees) > p:
        high *= 2
    while high - low > PRECISION * high:
        middle = (low + high) / 2
        low, high = (middle, high) if t_test(middle, degrees) > p else (low, middle)
    return high
