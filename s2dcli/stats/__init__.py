"""Figures of evaluations, and how sure they are. All rates are fractions between 0 and 1; nothing here needs torch.

basic    means, standard errors over problems, pass@k, intervals        pairs    two results on the same problems
student  Student's t                                                    crossed  two routes, several training seeds of each
summary  what an evaluation reports                                     clustered  tokens and samples of problems: ratios, AUC
routes   which route the evidence about a pair favours
"""

from s2dcli.stats.basic import avg_at_k, mean, pass_at_k, score_interval, standard_error, variance_parts
from s2dcli.stats.clustered import Estimate
from s2dcli.stats.crossed import route_difference
from s2dcli.stats.pairs import holm, paired_difference, sign_flip_test
from s2dcli.stats.student import POWER, SIGNIFICANT, t_quantile, t_test
from s2dcli.stats.summary import (
    NO_NOTION,
    NO_NOTION_HINT,
    Figures,
    Scores,
    Summary,
    cautions,
    in_words,
    is_right,
    majority_score,
    powers_of_two,
    problems_or_samples,
    summarize,
    verdict,
    vote,
)

__all__ = [
    "NO_NOTION",
    "NO_NOTION_HINT",
    "POWER",
    "SIGNIFICANT",
    "Estimate",
    "Figures",
    "Scores",
    "Summary",
    "avg_at_k",
    "cautions",
    "holm",
    "in_words",
    "is_right",
    "majority_score",
    "mean",
    "paired_difference",
    "pass_at_k",
    "powers_of_two",
    "problems_or_samples",
    "route_difference",
    "score_interval",
    "sign_flip_test",
    "standard_error",
    "summarize",
    "t_quantile",
    "t_test",
    "variance_parts",
    "verdict",
    "vote",
]
