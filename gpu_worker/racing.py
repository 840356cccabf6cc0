"""Racing: a candidate is stopped where it is worse than another on the same windows. Pure.

Either as soon as it is clearly worse (racing), or after some windows if it is worse there at all (multi-fidelity).
"""

import math
import statistics
from collections.abc import Sequence

from protocol.candidate import LEAST_RACE, Race


def is_beaten(losses: Sequence[float], race: Race) -> bool:
    """Whether the candidate with these `losses` of the first windows has lost its race."""
    if len(losses) >= len(race.against):  # all are measured already, or there is nothing to race against
        return False
    if race.confidence is not None and is_clearly_worse(losses, race.against, race.confidence):
        return True
    seen = race.first_windows
    return seen == len(losses) and math.fsum(losses) > math.fsum(race.against[:seen])


def is_clearly_worse(losses: Sequence[float], against: Sequence[float], confidence: float) -> bool:
    """Whether the candidate with these `losses` of the first windows is worse than the one with `against`.

    A one-sided paired t-test over windows. As it is made again after each window, each time may be wrong with only its
    share of 1 − `confidence` (Bonferroni): over all windows a candidate that is as good is stopped with at most
    that probability, in so far as differences between windows are normal.
    """
    seen, looks = len(losses), len(against) - LEAST_RACE
    if seen < LEAST_RACE or looks <= 0:
        return False
    differences = [loss - other for loss, other in zip(losses, against, strict=False)]
    if not all(map(math.isfinite, differences)):  # it will be called broken at its end
        return False
    mean, spread = statistics.fmean(differences), statistics.stdev(differences)
    if spread == 0:
        return mean > 0
    from scipy.special import stdtr  # here, for it takes half a second, and few searches race

    statistic = mean / (spread / math.sqrt(seen))
    return bool(stdtr(seen - 1, -statistic) < (1 - confidence) / looks)
