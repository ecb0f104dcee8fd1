"""Two routes, each trained with several seeds, measured on the same problems: seeds and problems as crossed random effects.

The score of seed s of route r on problem i is modelled as

    y_rsi = mu_r + seed_rs + problem_i + (route x problem)_ri + residual_rsi

with everything but mu_r random and independent. A seed belongs to one route, and all seeds meet all problems. The residual
holds how a seed and a problem go together, and the noise of decoding. For D = mean of B - mean of A over S_B and S_A seeds and n problems,

    Var D = V_problems / n + sum over routes of (V_seeds,r / S_r + V_residual,r / (S_r n)),

where V_problems is the variance of (route x problem)_B - (route x problem)_A. Three mean squares estimate it: d, the variance over
problems of the difference of the routes' means, is V_problems + sum V_residual,r / S_r; m_r, the variance over seeds of their averages,
is V_seeds,r + V_residual,r / n; e_r, the residual mean square of the S_r x n table, is V_residual,r. So

    Var D = d / n + sum (m_r / S_r - e_r / (S_r n)),

with the seeds' part of each route held at 0 or more. Its degrees of freedom are Satterthwaite's. With few seeds they are few, and
the interval is wide: that is what few seeds say of other seeds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from s2dcli.stats.basic import mean, standard_error
from s2dcli.stats.pairs import ROUNDING, Scores, detectable, inference, is_resolved


def _variance(values: Sequence[float]) -> float:
    return standard_error(values) ** 2 * len(values)


def route_difference(first: Sequence[Scores], second: Sequence[Scores]) -> dict[str, Any]:
    """Compare two routes of at least two seeds each, over the problems that all have.

    The keys of `pairs.paired_difference`, but for those on samples, and with p Student's t of `degrees` degrees of freedom. `a` and `b`
    are means over seeds and problems; wins, losses and ties count problems by the routes' means there; seeds [of A, of B];
    se_problems and se_seeds are what problems (with the residual) and seeds contribute to se.
    Raises ValueError if a route has one seed, no problem or one is in all, or the sample counts of a seed's problems differ.
    """
    if min(len(first), len(second)) < 2:
        raise ValueError("one training seed says nothing about others: two or more of each route are needed")
    shared = [problem for problem in first[0] if all(problem in side for side in (*first, *second))]
    if len(shared) < 2:
        raise ValueError(f"{'one problem is' if shared else 'no problem is'} in all of them")
    tables = [[[mean(seed[problem]) for problem in shared] for seed in route] for route in (first, second)]
    per_problem = [[mean(column) for column in zip(*table, strict=True)] for table in tables]
    differences = [b - a for a, b in zip(*per_problem, strict=True)]
    n, difference = len(shared), mean(differences)
    terms = [(_variance(differences) / n, n - 1)]  # (contribution to Var D, degrees of freedom)
    of_seeds = 0.0
    for table, means in zip(tables, per_problem, strict=True):
        seeds = [mean(row) for row in table]
        centre = mean(seeds)
        residuals = ((y - s - m + centre) ** 2 for row, s in zip(table, seeds, strict=True) for y, m in zip(row, means, strict=True))
        degrees = (len(seeds) - 1) * (n - 1)
        between, residual = _variance(seeds) / len(seeds), math.fsum(residuals) / degrees / (len(seeds) * n)
        if between > residual:
            of_seeds += between - residual
            terms += [(between, len(seeds) - 1), (-residual, degrees)]
    variance = math.fsum(value for value, _ in terms)
    error = math.sqrt(variance) if variance > ROUNDING**2 else 0.0
    degrees = max(1.0, variance**2 / math.fsum(value**2 / count for value, count in terms)) if error else None
    found = {
        "problems": n,
        "seeds": [len(first), len(second)],
        "a": mean(per_problem[0]),
        "b": mean(per_problem[1]),
        "difference": difference,
        "se": error,
        "se_problems": math.sqrt(terms[0][0]),
        "se_seeds": math.sqrt(of_seeds),
        "degrees": degrees,
        **inference(difference, error, degrees or 1),
        "p_method": "t",
        "wins": sum(value > ROUNDING for value in differences),
        "losses": sum(value < -ROUNDING for value in differences),
        "ties": sum(abs(value) <= ROUNDING for value in differences),
        "detectable": detectable(error, degrees) if error else None,
    }
    found["p"] = found["p_t"]
    return {**found, "resolved": is_resolved(found)}
