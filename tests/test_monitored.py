"""Keys that hooks watch: there at every evaluation, or refused before training."""

import json
import math
from pathlib import Path

from mmseg_imbalance.registry import METRICS

import numpy as np
import pytest
from mmengine.evaluator import BaseMetric
from scripted import config, log_of, run, write_images

from mmseg_imbalance.monitored import Monitored, given_in, monitored_in

ROAD, POLE, SKY = range(3)


@METRICS.register_module()
class OwnMetric(BaseMetric):
    """A metric of somebody else's, which may give any key."""

    def process(self, data_batch, data_samples):
        self.results.append(1)

    def compute_metrics(self, results):
        return dict(own=1.0)


@pytest.fixture
def data(tmp_path):
    """Labels without a pole, half road, half sky."""
    labels = np.zeros((2, 6, 8), int)
    labels[:, 3:] = SKY
    return write_images(tmp_path / 'data', labels)


def seeing(poles):
    """Predictions in which so many pixels of each image are poles, the others road."""
    predictions = np.zeros((2, 6, 8), int)
    predictions.reshape(2, -1)[:, :poles] = POLE
    return predictions.tolist()


def watched(data, name, script, **options):
    """The runner of a finished training in which somebody watches a key."""
    cfg = config(data, len(script), **options)
    cfg.model.script = script
    runner = run(cfg, name)
    runner.train()
    return runner


def with_best(key, rule='greater'):
    return {'default_hooks.checkpoint.save_best': key, 'default_hooks.checkpoint.rule': rule}


def test_save_best_on_a_class_that_comes_and_goes(data, tmp_path):
    script = [seeing(n) for n in (0, 3, 0)]  # nowhere, an error, nowhere
    runner = watched(data, tmp_path.name, script, **with_best('IoU.pole'))
    assert runner.iter == 3
    assert [path.name for path in Path(runner.work_dir).glob('best_*')] == ['best_IoU.pole_iter_1.pth']
    assert log_of(runner).count("['IoU.pole'] have no value at this") == 1


def test_save_best_takes_the_best_of_the_evaluations_that_have_a_value(tmp_path):
    labels = np.zeros((2, 6, 8), int)
    labels[:, 3:] = SKY
    labels.reshape(2, -1)[:, :12] = POLE  # the rarest
    data = write_images(tmp_path / 'data', labels)
    script = [seeing(n) for n in (0, 6, 12, 4)]
    # of a class that is never predicted, the precision has no value
    options = with_best(['mPrecision.tail', 'mRecall.tail'])
    runner = watched(data, tmp_path.name, script, **options)
    names = {path.name for path in Path(runner.work_dir).glob('best_*')}
    assert names == {'best_mPrecision.tail_iter_2.pth', 'best_mRecall.tail_iter_3.pth'}


@pytest.mark.parametrize('with_hook', [True, False])
def test_early_stopping_goes_on_where_a_class_is_nowhere(data, tmp_path, with_hook):
    stop = dict(type='EarlyStoppingHook', monitor='IoU.pole', rule='greater', patience=3, strict=True)
    hooks = [*config(data).custom_hooks, stop] if with_hook else [stop]
    script = [seeing(n) for n in (0, 3, 0, 3, 0, 0)]
    runner = watched(data, tmp_path.name, script, custom_hooks=hooks)
    assert runner.iter == 4  # the first and three without any progress; at NaN it would have ended at once
    assert 'did not improve' in log_of(runner)


def test_keys_that_nobody_watches_are_nan_and_in_the_log(data, tmp_path):
    runner = watched(data, tmp_path.name, [seeing(0), seeing(3)])
    lines = Path(runner._log_dir, 'vis_data', 'scalars.json').read_text().splitlines()
    first, second = (record for record in map(json.loads, lines) if 'mIoU' in record)
    assert first.keys() == second.keys()
    assert math.isnan(first['IoU.pole'])
    assert second['IoU.pole'] == 0
    assert 'have no value' not in log_of(runner)


@pytest.mark.parametrize(
    ('key', 'near'),
    [
        ('IoU.pool', 'IoU.pole'),
        ('mIoU.rare', 'mIoU'),
        ('val/IoU.pole', 'IoU.pole'),
        ('mRecall.tiny', 'mRecall.tail'),
        ('mDice', 'mIoU'),
        ('mIoU_I_q7', 'mIoU_I_q5'),
    ],
)
def test_a_key_that_cannot_exist_is_refused_before_training(data, tmp_path, key, near):
    runner = run(config(data, **with_best(key)), tmp_path.name)
    with pytest.raises(ValueError, match=f"save_best of CheckpointHook names '{key}', which no") as error:
        runner.train()
    assert f"'{near}'" in str(error.value)
    assert runner.iter == 0


@pytest.mark.parametrize('key', ['mIoU.body', 'mIoU.head', 'Recall.small.road'])
def test_keys_that_an_option_switches_off_are_refused(data, tmp_path, key):
    evaluator = dict(type='ImbalanceIoUMetric', groups=dict(tail=['pole'], body=[]), object_areas=None)
    runner = run(config(data, val_evaluator=evaluator, **with_best(key)), tmp_path.name)
    with pytest.raises(ValueError, match=f"'{key}', which no evaluation"):
        runner.train()


def test_other_watchers_and_metrics_are_looked_at_too(data, tmp_path):
    stop = dict(type='EarlyStoppingHook', monitor='IoU.pool', rule='greater')
    hooks = [*config(data).custom_hooks, stop]
    with pytest.raises(ValueError, match=r"monitor of EarlyStoppingHook names 'IoU.pool'"):
        run(config(data, custom_hooks=hooks), f'{tmp_path.name}-1').train()
    schedule = dict(type='ReduceOnPlateauLR', monitor='mIoU.tial', rule='greater')
    with pytest.raises(ValueError, match=r"monitor of ReduceOnPlateauLR names 'mIoU.tial'"):
        run(config(data, param_scheduler=schedule), f'{tmp_path.name}-2').train()
    plain = dict(type='IoUMetric')
    with pytest.raises(ValueError, match=r"'IoU\.pole'.*IoU.NAME is of ClassIoUMetric"):
        run(config(data, val_evaluator=plain, **with_best('IoU.pole')), f'{tmp_path.name}-3').train()
    run(config(data, val_evaluator=plain, **with_best('mIoU')), f'{tmp_path.name}-4').train()


def test_a_metric_of_somebody_elses_may_give_any_key(data, tmp_path):
    evaluators = [dict(type='ClassIoUMetric'), dict(type='OwnMetric')]
    runner = run(config(data, val_evaluator=evaluators, **with_best('own')), tmp_path.name)
    runner.train()
    assert (Path(runner.work_dir) / 'best_own_iter_1.pth').exists()


def test_without_validation_or_with_auto_nothing_is_refused(data, tmp_path):
    cfg = config(data, **with_best('IoU.pool'))
    cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    run(cfg, f'{tmp_path.name}-1').train()
    runner = run(config(data, **with_best('auto', None)), f'{tmp_path.name}-2')
    runner.train()
    assert runner.iter == 1


def test_groups_whose_training_pixels_cannot_be_counted_are_refused_where_they_are_watched(data, tmp_path):
    options = {'train_dataloader.dataset.metainfo': dict(classes=('road', 'pole', 'tree'))}
    message = r"'mIoU.tail' is watched, but .* cannot be counted .*'tree'.*Give groups="
    with pytest.raises(ValueError, match=message):
        run(config(data, **with_best('mIoU.tail'), **options), f'{tmp_path.name}-1').train()
    run(config(data, **with_best('mIoU'), **options), f'{tmp_path.name}-2').train()


NO_HOOK = dict(custom_hooks=[])
TOLD_BEFORE = r".* With dict\(type='RunHook'\) in custom_hooks you are told before training"


def refused_at_the_first_evaluation(data, name, message, **options):
    runner = run(config(data, 3, **options), name)
    with pytest.raises(ValueError, match=message + TOLD_BEFORE):
        runner.train()
    assert runner.iter == 1
    assert not list(Path(runner.work_dir).glob('best_*'))


@pytest.mark.parametrize('metric', ['ClassIoUMetric', 'ImbalanceIoUMetric'])
@pytest.mark.parametrize(
    'best',
    [dict(save_best='IoU.hair loss'), dict(save_best=['mIoU', 'IoU.hair loss'], rule=['greater', 'less'])],
)
def test_without_a_hook_a_rule_that_is_wrong_ends_the_first_evaluation(data, tmp_path, metric, best):
    options = {
        'default_hooks.checkpoint': dict(config(data).default_hooks.checkpoint) | best,
        'val_evaluator': dict(_delete_=True, type=metric),
        'classes': ('road', 'pole', 'hair loss'),
    }
    message = 'save_best of CheckpointHook takes a lower .IoU.hair loss.'
    refused_at_the_first_evaluation(data, tmp_path.name, message, **options, **NO_HOOK)


STOP = dict(type='EarlyStoppingHook', monitor='IoU.polee', rule='greater', priority='LOW')
PLATEAU = dict(type='ReduceOnPlateauLR', monitor='IoU.polee', rule='greater')


@pytest.mark.parametrize(
    'watcher',
    [
        dict(custom_hooks=[STOP]),
        dict(param_scheduler=PLATEAU),
        dict(param_scheduler=[dict(type='ConstantLR', factor=1.0), PLATEAU]),
        with_best('IoU.polee'),
    ],
)
def test_without_a_hook_a_key_that_cannot_exist_ends_the_first_evaluation(data, tmp_path, watcher):
    message = r"(monitor|save_best) of \w+ names 'IoU.polee', which no .*'IoU.pole'"
    refused_at_the_first_evaluation(data, tmp_path.name, message, **(NO_HOOK | watcher))


@pytest.mark.parametrize(
    'schedules', [PLATEAU, [PLATEAU], dict(one=PLATEAU, two=[]), dict(one=[dict(type='ConstantLR'), PLATEAU])]
)
def test_a_schedule_is_found_wherever_a_config_may_have_it(schedules):
    found = monitored_in(dict(param_scheduler=schedules))
    assert found == [Monitored('IoU.polee', 'greater', 'monitor of ReduceOnPlateauLR')]


def test_a_schedule_watches_a_lower_loss_by_default():
    found = monitored_in(dict(param_scheduler=dict(type='ReduceOnPlateauLR')))
    assert found == [Monitored('loss', 'less', 'monitor of ReduceOnPlateauLR')]


@pytest.mark.parametrize('several', [False, True])
@pytest.mark.parametrize('inside', [False, True])
def test_a_metric_is_found_wherever_a_config_may_have_it(several, inside):
    metric = dict(type='mmseg.IoUMetric', iou_metrics=['mIoU', 'mDice'], prefix='a')
    metrics = [metric] if several else metric
    evaluator = dict(type='Evaluator', metrics=metrics) if inside else metrics
    (found,) = given_in(dict(val_evaluator=evaluator), dict(classes=('road', 'pole')))
    assert found == {f'a/{key}': 'greater' for key in ('aAcc', 'mIoU', 'mAcc', 'mDice')}


@pytest.mark.parametrize(
    'metric', [dict(type='OwnMetric', made=False), dict(type='mmseg.IoUMetric', format_only=True)]
)
def test_a_metric_whose_keys_are_not_known_may_give_any(tmp_path, metric):
    metric = metric | (dict(output_dir=str(tmp_path)) if 'format_only' in metric else {})
    assert given_in(dict(val_evaluator=metric), dict(classes=('road',))) == [None]


def test_without_a_hook_a_group_that_cannot_be_counted_ends_the_first_evaluation_if_it_is_watched(
    data, tmp_path
):
    options = {
        'train_dataloader.dataset.metainfo': dict(classes=('road', 'pole', 'tree')),
        'val_evaluator.prefix': 'v',
    }
    message = "'v/mIoU.tail' is watched, but .* cannot be counted .*'tree'.*"
    name = f'{tmp_path.name}-1'
    refused_at_the_first_evaluation(data, name, message, **with_best('v/mIoU.tail'), **options, **NO_HOOK)
    runner = watched(data, f'{tmp_path.name}-2', [seeing(0)], **with_best('v/mIoU'), **options, **NO_HOOK)
    assert log_of(runner).count('ImbalanceIoUMetric cannot count') == 1


def test_without_a_hook_what_is_right_or_not_known_ends_nothing(data, tmp_path):
    evaluators = [
        dict(type='ClassIoUMetric', prefix='a'),
        dict(type='mmseg.IoUMetric'),
        dict(type='OwnMetric'),
    ]
    best = with_best(['a/IoU.pole', 'mIoU', 'own'])
    runner = watched(data, tmp_path.name, [seeing(0)], val_evaluator=evaluators, **best, **NO_HOOK)
    assert len(list(Path(runner.work_dir).glob('best_*'))) == 3
    assert "['a/IoU.pole'] have no value" in log_of(runner)


def test_a_validation_alone_does_not_ask_what_a_training_would_watch(data, tmp_path):
    assert 'mIoU' in run(config(data, param_scheduler=PLATEAU, **NO_HOOK), tmp_path.name).val()


def test_a_mended_config_is_not_refused_for_that_of_the_checkpoint(data, tmp_path):
    interval = {'default_hooks.checkpoint.interval': 1}
    wrong = run(config(data, **with_best('IoU.polee'), **NO_HOOK, **interval), f'{tmp_path.name}-1')
    with pytest.raises(ValueError, match=r"'IoU.polee', which no"):
        wrong.train()
    cfg = config(data, 3, **with_best('IoU.pole'), **NO_HOOK)
    cfg.resume, cfg.load_from = True, str(Path(wrong.work_dir, 'iter_1.pth'))
    runner = run(cfg, f'{tmp_path.name}-2')
    runner.train()
    assert runner.iter == 3
    assert log_of(runner).count('a resumed run shows the config of its checkpoint') == 1


def test_a_lower_value_is_never_the_better_one(data, tmp_path):
    names = ('road', 'pole', 'forest loss')
    # MMEngine finds 'loss' in the name
    with pytest.raises(ValueError, match=r"takes a lower 'IoU.forest loss' for the better.*rule='greater'"):
        run(config(data, classes=names, **with_best('IoU.forest loss', None)), tmp_path.name).train()


def with_distances(key, rule='less'):
    return {'val_evaluator': dict(type='ImbalanceIoUMetric', iou_metrics=['mIoU', 'mHD95'])} | with_best(
        key, rule
    )


@pytest.mark.parametrize('prefix', [None, 'a/HD95.'])
def test_the_best_checkpoint_is_that_of_the_smallest_distance(tmp_path, prefix):
    labels = np.zeros((2, 6, 8), int)
    labels[:, :, 0] = POLE
    labels[:, 5:] = SKY
    data = write_images(tmp_path / 'data', labels)
    here = [np.where(labels == POLE, ROAD, labels) for _ in range(4)]
    for prediction, column in zip(here, (None, 5, 2, 3), strict=True):
        if column is not None:
            prediction[:, :5, column] = POLE
    script = [prediction.tolist() for prediction in here]
    key = 'HD95.pole' if prefix is None else f'{prefix}/HD95.pole'
    options = with_distances(key)
    if prefix is not None:
        options['val_evaluator']['prefix'] = prefix
    stop = dict(type='EarlyStoppingHook', monitor=key, rule='less', patience=4)
    hooks = [*config(data).custom_hooks, stop]
    runner = watched(data, tmp_path.name, script, custom_hooks=hooks, **options)
    assert runner.iter == 4
    best = [str(path.relative_to(runner.work_dir)) for path in Path(runner.work_dir).rglob('best_*.pth')]
    assert [name.endswith('HD95.pole_iter_3.pth') for name in best] == [True]
    assert runner.message_hub.get_info('best_score') == 2
    # no pole was found at first: no distance, which must not be taken for the best one
    assert log_of(runner).count(f"['{key}'] have no value at this") == 1
    records = [
        json.loads(x) for x in Path(runner._log_dir, 'vis_data', 'scalars.json').read_text().splitlines()
    ]
    assert [record[key] for record in records if key in record] == [1e6, 5, 2, 3]


@pytest.mark.parametrize('key', ['HD95.top', 'HD95.infinite.top', 'mHD95', 'mHD95.tail.infinite'])
@pytest.mark.parametrize('hooks', [{}, dict(custom_hooks=[])])
def test_a_higher_distance_is_never_the_better_one(data, tmp_path, key, hooks):
    # MMEngine finds 'top' in the name
    options = with_distances(key, None if 'top' in key else 'greater')
    options['val_evaluator']['groups'] = dict(tail=['road'])
    runner = run(config(data, classes=('road', 'pole', 'top'), **options, **hooks), tmp_path.name)
    with pytest.raises(ValueError, match=f"takes a higher '{key}' for the better.*rule='less'"):
        runner.train()


def test_distances_are_there_only_if_they_are_asked_for(data, tmp_path):
    runner = run(config(data, **with_best('HD95.pole', 'less')), tmp_path.name)
    with pytest.raises(ValueError, match=r"'HD95\.pole', which no evaluation"):
        runner.train()


@pytest.mark.parametrize(
    'name', ['forest loss', 'maritime', 'wall/fence', 'traffic light', '道路', 'a.b', 'tail', 'mIoU']
)
def test_any_class_name_can_be_watched_and_is_logged(data, tmp_path, name):
    key = f'IoU.{name}'
    classes = ('road', 'pole', name)
    script = [np.full((2, 6, 8), label).tolist() for label in (ROAD, SKY)]
    stop = dict(type='EarlyStoppingHook', monitor=key, rule='greater')
    hooks = [*config(data).custom_hooks, stop]
    options = with_best(key) | dict(custom_hooks=hooks)
    runner = watched(data, tmp_path.name, script, classes=classes, **options)
    best = [path.name for path in Path(runner.work_dir).glob('best_*')]
    assert best == [f'best_IoU.{name.replace("/", "_")}_iter_2.pth']
    records = Path(runner._log_dir, 'vis_data', 'scalars.json').read_text().splitlines()
    assert json.loads(records[-1])[key] == 50
    assert runner.message_hub.get_info('best_score') == 50


def test_two_metrics_with_the_same_keys_are_refused_before_training(data, tmp_path):
    twice = [dict(type='ClassIoUMetric'), dict(type='IoUMetric')]
    with pytest.raises(ValueError, match=r"same keys, such as 'aAcc'.*prefix='NAME'"):
        run(config(data, val_evaluator=twice), tmp_path.name).train()
