"""A finding, and the statistics that distinguish it from chance.

Most thresholds are statistical, with their source beside them. An accuracy p over n images has the binomial standard
error sqrt(p (1 - p) / n); a loss has the standard error of its mean over the images.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from scipy import stats

from raycifar.analysis.history import RunHistory, thinned
from raycifar.storage.schemas import finite
from raycifar.words import listed

SIGMAS = 3.0  # a difference of this many standard errors or more counts as real: Shewhart (1931), p = 0.0027
SURE = 0.99  # confidence in what is SIGMAS or more standard errors from chance; no finding has more
FIT = 0.2  # McFadden (1979): a pseudo-R² of 0.2 to 0.4 is an excellent fit, less explains little
COARSE = 0.025  # half a 95% interval of 5 points: architectures that are compared differ by less
FEW_EPOCHS = 5  # of fewer, no spread of changes can be estimated
OUTSIDE = "To see how it would end, train its recipe outside the search."


@dataclass(frozen=True)
class Finding:
    """What a curve shows: `kind` is one of `docs/report.md`, `confidence` a probability, `epochs` where it is seen."""

    kind: str
    confidence: float
    evidence: str
    advice: str
    epochs: list[int] = field(default_factory=list)
    metrics: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return finite(asdict(self))


def has(found: Sequence[Finding], *kinds: str) -> bool:
    return any(finding.kind in kinds for finding in found)


def standard_error(p: float, n: int) -> float:
    """Return the standard error of a fraction `p` of `n`."""
    return math.sqrt(max(p * (1 - p), 1 / n) / n)


def spread_of_changes(values: np.ndarray) -> float:
    """Return the robust standard deviation of the changes from epoch to epoch: 1.4826 times their median deviation."""
    changes = np.diff(values)
    known = changes[np.isfinite(changes)]
    return float(stats.median_abs_deviation(known, scale="normal")) if len(known) else math.inf


def robust_slope(values: np.ndarray) -> tuple[float, float, float]:
    """Return the change per epoch by Theil (1950) and Sen (1968), and the ends of its 95% interval; NaN if unknown."""
    known = np.flatnonzero(np.isfinite(values))
    epochs = known[thinned(len(known))]
    if len(epochs) < 2:
        return math.nan, math.nan, math.nan
    slope, _, low, high = stats.theilslopes(values[epochs], epochs, alpha=0.95)
    return float(slope), float(low), float(high)


def go_on(history: RunHistory, otherwise: str) -> str:
    """Return the advice to train the remaining epochs of a run, or `otherwise` if there are none."""
    if history.stopped_by_search:
        return OUTSIDE
    return "Continue this run." if history.unfinished else otherwise


def calm(history: RunHistory) -> str:
    clip = [] if history.recipe.clip_norm else ["clip gradients (--clip-norm 1)"]
    return f"{listed(['Lower --lr', 'lengthen --warmup', *clip], 'or')}."
