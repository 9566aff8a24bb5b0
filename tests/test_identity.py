"""Which runs are seeds of one config, and which are others: what was trained, tested and evaluated."""

import json
import shutil

import numpy as np
import pytest
from mmengine.config import Config
from test_comparison import CLASSES, change_rows, write_run

from mmseg_imbalance.decisions import LogitAdjustmentHook
from mmseg_imbalance.reports.comparison import compare
from mmseg_imbalance.reports.identity import data_roots, deciding_hooks, evaluated_at, settings
from mmseg_imbalance.reports.work_dirs import read_run
from mmseg_imbalance.run_hook import RunHook

TESTED = """
data = dict(data_root={root!r}, data_prefix=dict(img_path='images/val'), indices={indices})
test_dataloader = dict(dataset=data)
test_evaluator = dict(type={metric!r}, ignore_index={ignored}, quantiles={quantiles})
"""


def evaluation(root='data/street', indices=None, metric='ImbalanceIoUMetric', ignored=None, quantiles=(1,)):
    return TESTED.format(root=root, indices=indices, metric=metric, ignored=ignored, quantiles=quantiles)


def train_with(work_dir, text):
    """Add lines to the config of a training."""
    config = work_dir / '20260101_000000' / 'vis_data' / 'config.py'
    config.write_text(config.read_text() + text)


def number_of_groups(*work_dirs):
    comparison = compare(list(work_dirs))
    assert not comparison.left_out
    return len(comparison.groups)


@pytest.fixture
def pair(tmp_path):
    """Two seeds of one config."""
    return [write_run(tmp_path / f'ce-{seed}', 'CE', seed, extra=evaluation()) for seed in (0, 1)]


@pytest.mark.parametrize(
    ('change', 'groups'),
    [
        (dict(indices=20), 2),
        (dict(metric='ClassIoUMetric'), 2),
        (dict(ignored=3), 2),
        (dict(root='/elsewhere/street'), 1),  # the images are the same
        (dict(quantiles=(1, 5)), 1),  # more numbers, the same IoU
    ],
)
def test_what_was_tested_is_part_of_a_run(pair, tmp_path, change, groups):
    other = write_run(tmp_path / 'other', 'CE', 2, extra=evaluation(**change))
    assert number_of_groups(*pair, other) == groups


def test_runs_tested_on_other_images_are_no_seeds_of_one_config(pair):
    change_rows(pair[1], images=np.array([f'other{n}.png' for n in range(40)]))
    comparison = compare(pair)
    assert len(comparison.groups) == 2
    assert comparison.groups[1].estimates['mIoU'].within_noise is None
    assert all('tested data=40 images' in group.name for group in comparison.groups)


def test_more_gpus_are_another_training(pair):
    log = pair[1] / '20260101_000000' / '20260101_000000.log'
    log.write_text(log.read_text().replace('GPU number: 2', 'GPU number: 8'))
    comparison = compare(pair)
    assert [group.name.partition(' ')[2] for group in comparison.groups] == ['[processes=2]', '[processes=8]']


WRAPPED = """
train_dataloader = dict(dataset=dict(type='RepeatDataset', times=2, dataset=dict(data_root={root!r})))
"""


@pytest.mark.parametrize('scored', [False, True])
def test_another_folder_of_a_wrapped_data_set_is_another_training_unless_its_counts_are_the_same(
    tmp_path, scored
):
    dirs = [write_run(tmp_path / f'ce-{seed}', 'CE', seed, scored=scored) for seed in (0, 1)]
    for work_dir, root in zip(dirs, ('data/a', 'data/b'), strict=True):
        train_with(work_dir, WRAPPED.format(root=root))
    comparison = compare(dirs)
    assert len(comparison.groups) == (1 if scored else 2)
    noted = any("trained on data at ['data/a', 'data/b']" in note for note in comparison.notes)
    assert noted == scored
    if scored:
        change_rows(dirs[1], pixels=np.arange(1, 7))
        assert number_of_groups(*dirs) == 2


def test_the_folders_of_wrapped_data_sets_are_found():
    part = dict(data_root='b', pipeline=[dict(type='Load')])
    both = dict(type='ConcatDataset', datasets=[part, dict(dataset=dict(data_root='a'))])
    assert data_roots(dict(dataset=both)) == ['a', 'b']
    assert data_roots(None) == []


@pytest.mark.parametrize(
    ('hook', 'groups'),
    [
        (dict(type='ClassBalanceHook', interval=50), 1),
        (dict(type='mmseg_imbalance.RunHook'), 1),
        (dict(type='ProfilerHook'), 1),
        (dict(type='EMAHook'), 2),
        (dict(type='EarlyStoppingHook', monitor='mIoU'), 2),
    ],
)
def test_a_hook_that_looks_on_is_no_other_training(pair, hook, groups):
    for work_dir, hooks in zip(pair, ([], [hook]), strict=True):
        train_with(work_dir, f'custom_hooks = {[*hooks, dict(type="ClassWeightHook")]}\n')
    assert number_of_groups(*pair) == groups


def test_hooks_that_a_python_config_gives_as_classes_are_known():
    plain = Config(dict(custom_hooks=[]))
    assert settings(Config(dict(custom_hooks=[dict(type=RunHook)])), 'val') == settings(plain, 'val')
    deciding = dict(type=LogitAdjustmentHook, tau=0.5)
    assert deciding_hooks(Config(dict(custom_hooks=[dict(type=RunHook), deciding]))) == [deciding]


def test_another_cache_folder_is_no_other_training(pair):
    for work_dir, folder in zip(pair, 'ab', strict=True):
        train_with(work_dir, f"custom_hooks = [dict(type='ClassWeightHook', cache_dir={folder!r})]\n")
    assert number_of_groups(*pair) == 1


def of_checkpoint(work_dir, name):
    path = next(work_dir.glob('test/*/vis_data/config.py'))
    path.write_text(path.read_text().replace(str(work_dir / 'iter_20.pth'), name))


def test_the_best_checkpoint_is_named_and_no_seed_of_the_last_ones(pair, tmp_path):
    third = write_run(tmp_path / 'third', 'CE', 2, extra=evaluation())
    of_checkpoint(pair[0], f'{pair[0]}/best_mIoU_iter_10.pth')
    of_checkpoint(pair[1], f'{pair[1]}/best_mIoU_iter_20.pth')
    comparison = compare([*pair, third])
    assert [len(group.runs) for group in comparison.groups] == [2, 1]
    assert 'checkpoint=best mIoU' in comparison.groups[0].name
    assert not any(run.complete for run in comparison.groups[0].runs)
    note = 'best_mIoU_iter_10 is the best checkpoint by mIoU on the validation images, after 10 iters'
    assert any(note in line for line in comparison.notes)


@pytest.mark.parametrize(
    ('checkpoint', 'end', 'expected'),
    [
        ('a/iter_20.pth', 20, 'end'),
        ('a/iter_10.pth', 20, 'iter 10'),
        ('a/iter_10.pth', None, 'end'),
        ('a/best_IoU.traffic_light_iter_10.pth', 20, 'best IoU.traffic_light'),
        ('a/latest.pth', 20, 'end'),
        ('a/bias_iter_20.pth', 20, 'end, bias'),
        ('a/bias.pth', 20, 'end, bias'),
        ('a/bias_iter_10.pth', 20, 'iter 10, bias'),
        ('a/bias_best_mIoU_iter_10.pth', 20, 'best mIoU, bias'),
        ('a/bias_iter_20.pth', None, 'end, bias'),
        ('a/averaged.pth', 20, 'averaged'),
        ('a/iter_20-1a2b3c4d.pth', 20, 'end'),
        ('a/best_mIoU_iter_10-1a2b3c4d.pth', 20, 'best mIoU'),
        ('a/epoch_2.pth', 20, 'end'),
        ('a/released.pth', None, 'end'),
    ],
)
def test_what_a_checkpoint_is_of_its_training(checkpoint, end, expected):
    what, note = evaluated_at(checkpoint, end, 'iter')
    assert what == expected
    assert bool(note) == (what != 'end')


def test_a_model_with_a_fitted_bias_is_no_seed_of_its_training(pair):
    plain = compare(pair)
    of_checkpoint(pair[1], f'{pair[1]}/bias_iter_20.pth')
    comparison = compare(pair)
    assert [len(group.runs) for group in plain.groups] == [2]
    assert [len(group.runs) for group in comparison.groups] == [1, 1]
    assert [group.runs[0].complete for group in comparison.groups] == [True, True]
    assert 'checkpoint=end, bias' in comparison.groups[1].name
    assert any('a bias that was fitted after training' in note for note in comparison.notes)


MESSAGES = [
    'the monitored metric did not improve in the last 5 records. best score: 41.200. ',
    'Stopping threshold reached: `mIoU` = 60.1 is greater than 60.',
    'Monitored metric mIoU = nan is infinite. Previous best value was 41.200.',
]


@pytest.mark.parametrize('message', MESSAGES)
def test_a_training_that_earlystoppinghook_ended_is_at_its_end(tmp_path, message):
    stopped = write_run(tmp_path / 'a', reached=10)
    whole = write_run(tmp_path / 'b', seed=1)
    for work_dir in (stopped, whole):
        train_with(work_dir, "custom_hooks = [dict(type='EarlyStoppingHook', monitor='mIoU')]\n")
    assert 'half-finished' in read_run(stopped).reason  # killed
    log = stopped / '20260101_000000' / '20260101_000000.log'
    log.write_text(f'{log.read_text()}2026/01/01 - mmengine - INFO - {message}\n')
    run = read_run(stopped)
    assert (run.complete, run.length) == (True, 10)
    assert 'ended by EarlyStoppingHook after 10 of 20 iters' in run.notes
    assert number_of_groups(stopped, whole) == 1


def test_the_same_relative_path_on_two_machines_is_two_models(tmp_path, monkeypatch):
    dirs = [write_run(tmp_path / machine / 'work_dirs' / 'a', seed=seed) for seed, machine in enumerate('mn')]
    for work_dir in dirs:
        of_checkpoint(work_dir, 'work_dirs/a/iter_20.pth')
    monkeypatch.chdir(tmp_path / 'm')
    [group] = compare(dirs).groups
    assert [run.work_dir for run in group.runs] == dirs
    [group] = compare([work_dir / 'test' for work_dir in dirs]).groups  # without their trainings
    assert len(group.runs) == 2
    comparison = compare([dirs[0], dirs[0] / 'test', dirs[1]])
    assert [(name, 'of the same model' in why) for name, why in comparison.left_out] == [
        (str(dirs[0] / 'test'), True)
    ]


def test_a_copy_of_a_work_dir_is_the_same_model(pair, tmp_path):
    of_checkpoint(pair[0], 'work_dirs/a/iter_20.pth')
    copy = shutil.copytree(pair[0], tmp_path / 'copy')
    [(name, reason)] = compare([*pair, copy]).left_out
    assert (name, reason) == (str(copy), f'it is of the same model as {pair[0]}')


def test_without_rows_of_images_the_part_of_the_data_tells(tmp_path):
    dirs = [
        write_run(tmp_path / f'{loss}-{seed}', loss, seed, scored=False, extra=evaluation(indices=indices))
        for loss, indices in (('CE', None), ('Dice', None), ('Focal', 20))
        for seed in (0, 1)
    ]
    _, same, other = (group.estimates['road'] for group in compare(dirs).groups)
    assert same.noise == 'seeds'
    assert other.within_noise is None
    path = next(dirs[0].glob('test/*/*.json'))
    assert set(json.loads(path.read_text())) > {f'IoU.{name}' for name in CLASSES}
    assert read_run(dirs[4]).data == 'street/images/val, indices 20, ImbalanceIoUMetric'
