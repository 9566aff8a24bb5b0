"""Names of configs on the page of a comparison."""

from pathlib import Path

import pytest
from mmengine.config import Config

from mmseg_imbalance.reports.identity import settings
from mmseg_imbalance.reports.names import readable_names, short_names
from mmseg_imbalance.reports.work_dirs import Run

CE = dict(type='CrossEntropyLoss', loss_weight=1.0)
COMBINED = dict(type='CombinedWeightedLoss', class_weight='auto')
RARE = dict(type='RareClassSampler', min_pixels=250)


def names(*configs):
    """Of (name, loss), (name, loss, sampler) or (name, loss, sampler, what the test adds)."""
    groups = {}
    for name, loss, sampler, *added in ((*config, None)[: max(3, len(config))] for config in configs):
        config = Config(
            dict(
                model=dict(decode_head=dict(loss_decode=loss)),
                train_dataloader=dict(sampler=sampler or dict(type='InfiniteSampler', shuffle=True)),
            )
        )
        source = ', '.join(['test of iter_9.pth', *added])
        groups[name] = [
            Run(Path(name), name, config, settings(config, 'test'), frozenset(), '', '', {}, source)
        ]
    return readable_names(groups)


def test_a_config_is_named_after_its_losses_and_its_sampler():
    assert names(
        ('net_small_data', CE),
        ('net_small-combined_data', COMBINED),
        ('net_small-combined-rcs_data', COMBINED, RARE),
        ('net_small-two_data', [CE, dict(type='mmseg_imbalance.WeightedDiceLoss')]),
        ('net_small-weighted_data', dict(CE, class_weight=[1.0, 2.0])),
    ) == [
        'cross-entropy',
        'CombinedWeightedLoss',
        'CombinedWeightedLoss + RareClassSampler',
        'cross-entropy + WeightedDiceLoss',
        'weighted cross-entropy',
    ]


@pytest.mark.parametrize(
    ('first', 'second', 'expected'),
    [
        (
            ('a', COMBINED),
            ('b', dict(COMBINED, absent_classes='ignore')),
            ['CombinedWeightedLoss', 'CombinedWeightedLoss, absent_classes=ignore'],
        ),
        (
            ('a', dict(COMBINED, power=0.5)),
            ('b', dict(COMBINED, power=1.0)),
            ['CombinedWeightedLoss, power=0.5', 'CombinedWeightedLoss, power=1.0'],
        ),
        (
            ('a', CE),
            ('a', CE, None, 'logit adjustment 1.0'),
            ['cross-entropy', 'cross-entropy, logit adjustment 1.0'],
        ),
        (
            ('a', dict(CE, max_iters=20, end=20)),
            ('b', dict(CE, max_iters=40, end=40)),
            ['cross-entropy, max_iters=20', 'cross-entropy, max_iters=40'],
        ),
        (
            ('net_r18_data', dict(CE, x=1, y=2, z=3)),
            ('net_b0_data', CE),
            ['cross-entropy (net_r18)', 'cross-entropy (net_b0)'],
        ),
    ],
)
def test_what_would_have_the_same_name_is_told_apart(first, second, expected):
    if first[0] == second[0]:  # as _grouped makes full names different
        second = (f'{second[0]} [tau=1]', *second[1:])
    assert names(first, second) == expected


def test_a_config_of_unknown_losses_keeps_a_part_of_its_name():
    assert names(('net_a_data', None), ('net_b_data', CE)) == ['net_a', 'cross-entropy']


def test_short_names_keep_one_word_of_what_is_common():
    names = ['net_b0-small_2k_data', 'net_b0-small-combined_2k_data', 'net_b0-small-combined-rcs_2k_data']
    assert short_names(names) == ['small', 'small-combined', 'small-combined-rcs']
    assert short_names(names[:1]) == names[:1]
    assert len(set(short_names(['a_b', 'a_b_b', 'a']))) == 3
