"""Paired tests over seeds: one number of each run, methods against a baseline."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats


class PairedTest(NamedTuple):
    """A method against the baseline, on the seeds that both have."""

    seeds: list[int]
    differences: list[float]  # method minus baseline, of each seed
    mean: float  # NaN without a common seed
    interval: tuple[float, float] | None  # of the mean, by Student's t; None: nothing tells
    p: float | None  # of the paired t-test, two-sided; None: nothing tells
    holm: float | None  # p corrected for the number of methods


def paired_tests(values: Mapping[str, Mapping[int, float]], baseline: str) -> dict[str, PairedTest]:
    """Each method against the baseline by a paired t-test over seeds, corrected by Holm.

    With differences d_1..d_n of the n common seeds, the 95 % interval is mean(d) +- t(n - 1) sd(d) / sqrt(n).
    From one seed, or from differences that are all equal, the noise is not known: there is neither interval
    nor p, and the method does not count for the correction.

    Args:
        values: a number of each run, {method: {seed: number}}; one that is NaN is left out.
        baseline: one of the methods.

    Returns:
        A test for each other method. Where tests of several metrics or data sets stand beside each other,
        give the p of all of them to :func:`holm`.

    Raises:
        ValueError: ``baseline`` is none of the methods.
    """
    if baseline not in values:
        raise ValueError(f'the baseline {baseline!r} is none of the methods {list(values)}')
    tests = {name: _test(of_seed, values[baseline]) for name, of_seed in values.items()}
    del tests[baseline]
    corrected = holm([test.p for test in tests.values()])
    return {name: test._replace(holm=p) for (name, test), p in zip(tests.items(), corrected, strict=True)}


def _test(method: Mapping[int, float], baseline: Mapping[int, float]) -> PairedTest:
    seeds = [s for s, value in method.items() if math.isfinite(value - baseline.get(s, math.nan))]
    differences = [float(method[seed] - baseline[seed]) for seed in sorted(seeds)]
    mean = float(np.mean(differences)) if differences else math.nan
    interval = p = None
    if np.ptp(differences or [0]) > 1e-12 * np.abs(differences).max(initial=0):
        tested = stats.ttest_1samp(differences, 0)
        low, high = tested.confidence_interval(0.95)
        interval, p = (float(low), float(high)), float(tested.pvalue)
    return PairedTest(sorted(seeds), differences, mean, interval, p, None)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """P-values corrected for their number m: of the k-th smallest, (m - k + 1) p, at least those before it.

    Args:
        p_values: None: not tested, which does not count.

    Source: Holm, A simple sequentially rejective multiple test procedure, 1979.
    """
    corrected: list[float | None] = [None] * len(p_values)
    tested = sorted((p, at) for at, p in enumerate(p_values) if p is not None)
    highest = 0.0
    for rank, (p, at) in enumerate(tested):
        highest = max(highest, min(1.0, (len(tested) - rank) * p))
        corrected[at] = highest
    return corrected
