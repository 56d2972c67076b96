"""Intervals, paired tests, many hypotheses at once; arrays in, arrays out, and it knows no head.

estimates      Tally → Measure: value, interval, baseline; the best of many, chosen and reported on different units
significance   is it more than chance: over seeds, over sentences, over many heads at once
stability      whether a ranking would be the same again, with other sentences or another seed
"""

from mhajax.statistics.estimates import Measure, Report, Tally, difference, estimate, select_and_report
from mhajax.statistics.significance import Maximum, Paired, benjamini_hochberg, max_statistic, paired, sign_flips
from mhajax.statistics.stability import Stability, agreement, bootstrap_stability, jaccard

__all__ = [
    "Maximum",
    "Measure",
    "Paired",
    "Report",
    "Stability",
    "Tally",
    "agreement",
    "benjamini_hochberg",
    "bootstrap_stability",
    "difference",
    "estimate",
    "jaccard",
    "max_statistic",
    "paired",
    "select_and_report",
    "sign_flips",
]
