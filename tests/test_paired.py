"""Paired tests over seeds."""

import math

import numpy as np
import pytest
from scipy import stats

from mmseg_imbalance.reports.paired import holm, paired_tests

BASE = {0: 50.0, 1: 52.0, 2: 51.0, 3: 49.0}


def test_a_method_is_tested_on_the_seeds_that_both_have():
    method = {3: 53.0, 1: 54.0, 0: 53.0, 7: 99.0}
    [test] = paired_tests(dict(base=BASE, ours=method), 'base').values()
    assert (test.seeds, test.differences) == ([0, 1, 3], [3.0, 2.0, 4.0])
    # by hand: mean 3, sd 1, t = 3 / (1 / sqrt(3)) = 5.196 with 2 degrees of freedom, 97.5 % quantile 4.303
    assert test.mean == 3
    assert test.interval == pytest.approx((3 - 4.302653 / math.sqrt(3), 3 + 4.302653 / math.sqrt(3)))
    # of 2 degrees of freedom there is a closed form: p = 1 - t / sqrt(2 + t^2)
    assert test.p == pytest.approx(1 - math.sqrt(27) / math.sqrt(29))
    assert test.holm == test.p


def test_it_is_scipys_paired_test_and_the_interval_holds_0_where_p_is_above_5_per_cent():
    rng = np.random.default_rng(0)
    verdicts = set()
    for shift in np.linspace(0, 3, 40):
        base, ours = rng.normal(size=5), rng.normal(shift, size=5)
        values = dict(base=dict(enumerate(base)), ours=dict(enumerate(ours)))
        test = paired_tests(values, 'base')['ours']
        theirs = stats.ttest_rel(ours, base)
        assert test.p == pytest.approx(theirs.pvalue)
        assert test.interval == pytest.approx(theirs.confidence_interval(0.95))
        verdicts.add(test.p < 0.05)
        assert (test.interval[0] <= 0 <= test.interval[1]) == (test.p >= 0.05)
    assert verdicts == {True, False}


@pytest.mark.parametrize('base', [{0: 50.0}, {}, {0: 0.0, 1: 0.0, 2: 0.0}, {0: math.nan, 1: 50.0}])
def test_where_nothing_tells_the_noise_there_is_neither_interval_nor_p(base):
    same = dict.fromkeys(range(3), 0.1 + 0.2)
    test = paired_tests(dict(base=base, ours=same), 'base')['ours']
    assert (test.interval, test.p, test.holm) == (None, None, None)
    assert math.isnan(test.mean) == (not base)


def test_holm_by_hand():
    # sorted: 0.005, 0.01, 0.03, 0.04 times 4, 3, 2, 1; the last not below the one before it
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, None, 0.7]) == [1.0, None, 1.0]
    assert holm([]) == []


def test_holm_corrects_over_all_methods_that_are_tested():
    rng = np.random.default_rng(1)
    means = dict(base=0, a=2, b=1, c=0)
    values = {name: dict(enumerate(rng.normal(mean, size=5))) for name, mean in means.items()}
    tests = paired_tests(values | dict(one={0: 1.0}), 'base')
    assert list(tests) == ['a', 'b', 'c', 'one']
    expected = holm([tests[name].p for name in 'abc'])
    assert [tests[name].holm for name in tests] == [*expected, None]
    assert tests['a'].holm > tests['a'].p


def test_holm_finds_something_among_nothing_in_5_per_cent_of_families():
    rng = np.random.default_rng(2)
    p = rng.random((4000, 8))
    found = np.mean([min(holm(row)) < 0.05 for row in p])
    assert found == pytest.approx(0.05, abs=0.011)


def test_an_unknown_baseline_is_named():
    with pytest.raises(ValueError, match=r"'plain' is none of the methods \['base'\]"):
        paired_tests(dict(base=BASE), 'plain')
