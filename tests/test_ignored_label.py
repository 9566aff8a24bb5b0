"""One label is no class: data sets, heads, losses, sampler and metric agree, or training does not begin."""

from types import SimpleNamespace

from mmseg_imbalance.registry import DATASETS, HOOKS, METRICS, MODELS

import numpy as np
import pytest
import torch
from mmengine.dataset import ConcatDataset, RepeatDataset
from mmengine.logging import MessageHub, MMLogger
from mmengine.registry import DefaultScope
from mmseg.datasets import BaseSegDataset
from mmseg.models.decode_heads import DDRHead
from ranks import on_ranks
from scripted import HEAD, config, log_of, run, write_images

from mmseg_imbalance.heads import FeatureHead
from mmseg_imbalance.ignored_label import (
    _check_metrics,
    give_ignored_label,
    ignored_label,
    label_of_evaluation,
)
from mmseg_imbalance.losses import WeightedCrossEntropyLoss
from mmseg_imbalance.reports.subclass_page import load

VOID = 254
EVALUATOR = dict(type='ImbalanceIoUMetric')


@DATASETS.register_module()
class VoidDataset(BaseSegDataset):
    """One that says it in its code."""

    METAINFO = dict(classes=('road', 'pole', 'sky'))

    def __init__(self, **kwargs):
        super().__init__(ignore_index=VOID, **kwargs)


def labels_with(void, poles=4):
    """Half void, then so many poles of 48 pixels, the rest road and sky."""
    labels = np.zeros((2, 6, 8), int)
    labels[:, 5] = 2
    labels.reshape(2, -1)[:, 24 : 24 + poles] = 1
    labels[:, :3] = void
    return labels


def blind(labels, void):
    """Predictions that are right but where nothing is known: there they are the pole."""
    return [np.where(labels == void, 1, labels).tolist()] * 9


@pytest.fixture
def void_data(tmp_path):
    return write_images(tmp_path / 'data', labels_with(VOID))


def trained(data, name, void=VOID, **options):
    cfg = config(data, **options)
    cfg.model.script = blind(labels_with(void), void)
    cfg.custom_hooks = [dict(type='ClassWeightHook', num_workers=0)]
    cfg.model.decode_head.loss_decode = dict(type='WeightedCrossEntropyLoss', class_weight='auto')
    runner = run(cfg, name)
    runner.train()
    return runner


OF_DATA = {f'{split}_dataloader.dataset.ignore_index': VOID for split in ('train', 'val')}
OF_TRAINING = {'train_dataloader.dataset.ignore_index': VOID}
OF_HEAD = {'model.decode_head.ignore_index': VOID}
OF_METRIC = dict(val_evaluator=EVALUATOR | dict(ignore_index=VOID))


@pytest.mark.parametrize(
    'said',
    [
        OF_DATA,
        OF_TRAINING,
        OF_HEAD,
        OF_DATA | OF_HEAD | OF_METRIC,
        OF_HEAD | OF_METRIC,
        {'train_dataloader.dataset.type': 'VoidDataset'},
    ],
)
def test_what_one_says_counts_for_all(void_data, tmp_path, said):
    runner = trained(void_data, tmp_path.name, **dict(val_evaluator=EVALUATOR) | said)
    head = runner.model.decode_head
    assert head.ignore_index == VOID
    assert runner.model.data_preprocessor.seg_pad_val == VOID
    # counted without the void, in both images 12 road, 4 poles, 8 sky
    pixels = np.array(runner.message_hub.get_info('class_weights')['pixels'])
    assert pixels.tolist() == [24, 8, 16]
    for key in ('mIoU', 'IoU.pole', 'mIoU.tail', 'aAcc'):
        assert runner.message_hub.get_scalar(f'val/{key}').current() == 100
    assert ('decode_head.ignore_index' in log_of(runner)) == (said.keys() & OF_HEAD.keys() == set())


@pytest.mark.parametrize('type', ['ClassIoUMetric', 'ImbalanceIoUMetric'])
@pytest.mark.parametrize('said', [OF_DATA, OF_HEAD, {'val_dataloader.dataset.ignore_index': VOID}])
def test_a_metric_finds_the_label_without_a_hook_too(void_data, tmp_path, type, said):
    cfg = config(void_data, val_evaluator=dict(_delete_=True, type=type), custom_hooks=[], **said)
    cfg.model.script = blind(labels_with(VOID), VOID)
    assert run(cfg, tmp_path.name).val()['IoU.pole'] == 100


def test_a_metric_alone_takes_the_frameworks_default():
    metric = METRICS.build(dict(type='ClassIoUMetric'))
    metric.dataset_meta = dict(classes=('road', 'pole', 'sky'))
    label = torch.tensor(labels_with(255)[:1])
    predicted = torch.tensor(blind(labels_with(255), 255)[0][:1])
    metric.process({}, [dict(pred_sem_seg=dict(data=predicted), gt_sem_seg=dict(data=label))])
    assert metric.evaluate(1)['mIoU'] == 100


@pytest.mark.parametrize(
    'text',
    [
        'model = <an object>',
        'model = dict(decode_head=[dict(type="A", ignore_index=8), dict(type="B", ignore_index=9)])',
    ],
)
def test_a_config_that_cannot_tell_costs_a_warning_alone(tmp_path, text):
    MMLogger.get_instance(tmp_path.name, log_file=str(tmp_path / 'run.log'))
    MessageHub.get_instance(tmp_path.name).update_info('cfg', text)
    test_a_metric_alone_takes_the_frameworks_default()
    log = (tmp_path / 'run.log').read_text()
    assert 'does not tell the ignored label' in log
    assert 'the metric takes 255' in log
    MMLogger._instance_dict.pop(tmp_path.name)


def test_a_data_set_that_ignores_a_class_is_followed_and_the_class_named(tmp_path):
    data = write_images(tmp_path / 'data', labels_with(0))
    runner = trained(data, tmp_path.name, 0, **{'train_dataloader.dataset.ignore_index': 0})
    assert runner.model.decode_head.ignore_index == 0
    lines = [line for line in log_of(runner).splitlines() if "So 'road' is not trained" in line]
    assert len(lines) == 1
    assert 'WARNING' in lines[0]


def test_a_head_that_ignores_a_class_is_ordinary(tmp_path):
    data = write_images(tmp_path / 'data', labels_with(0))
    said = {'model.decode_head.ignore_index': 0, 'val_evaluator.groups': dict(tail=['pole'])}
    runner = trained(data, tmp_path.name, void=0, **said)
    assert runner.message_hub.get_scalar('val/mIoU').current() == 100
    assert runner.message_hub.get_info('class_weights')['weights'][0] == 0


DISAGREEING = {
    'data set and head': (
        OF_DATA | {'model.decode_head.ignore_index': 0},
        ['254 of BaseSeg', '0 of FCNHead'],
    ),
    'auxiliary head': (
        OF_DATA | {'model.auxiliary_head': HEAD | dict(ignore_index=7)},
        ['254 of BaseSegDataset', '7 of FCNHead'],
    ),
    'metric told another': (
        OF_DATA | {'val_evaluator.ignore_index': 255},
        ['ImbalanceIoUMetric in val_evaluator has ignore_index=255', 'ignore 254'],
    ),
    "MMSegmentation's metric": (
        OF_HEAD | dict(val_evaluator=dict(type='IoUMetric')),
        ['IoUMetric in val_evaluator has ignore_index=255', 'Give it ignore_index=254'],
    ),
    'metric alone': (OF_METRIC, ['ImbalanceIoUMetric in val_evaluator has ignore_index=254', 'ignore 255']),
}


@pytest.mark.parametrize('case', DISAGREEING)
def test_who_disagrees_is_named_before_training(void_data, tmp_path, case):
    said, words = DISAGREEING[case]
    runner = run(config(void_data, **said), tmp_path.name)
    with pytest.raises(ValueError, match='ignore_index') as error:
        runner.train()
    assert runner.iter == 0
    assert all(word in str(error.value) for word in words), str(error.value)


def test_a_metric_that_leaves_out_a_class_is_a_warning(tmp_path):
    data = write_images(tmp_path / 'data', labels_with(255))
    runner = run(config(data, val_evaluator=dict(type='IoUMetric', ignore_index=0)), tmp_path.name)
    runner.train()
    assert "Predictions on pixels of 'road' count nowhere" in log_of(runner)


def dataset_of(label, kind=BaseSegDataset):
    return kind(lazy_init=True, metainfo=dict(classes=('a', 'b')), ignore_index=label, pipeline=[])


def test_wrapped_data_sets_and_their_configs_say_it_too():
    both = ConcatDataset([dataset_of(255), dataset_of(9)], lazy_init=True)
    assert ignored_label(both) == 9
    assert ignored_label(RepeatDataset(dataset_of(9), 2, lazy_init=True)) == 9
    inner = dict(type='mmseg.BaseSegDataset', metainfo=dict(classes=('a', 'b')))
    several = dict(type='ConcatDataset', datasets=[inner, inner | dict(ignore_index=9)])
    assert ignored_label(dict(type='RepeatDataset', times=2, dataset=several)) == 9
    assert ignored_label(dict(type='VoidDataset')) == VOID
    assert ignored_label(inner) == ignored_label() == ignored_label(dict(type='NoSuchDataset')) == 255
    assert ignored_label(inner, [dict(type='FCNHead', ignore_index=None)]) == 255
    different = ConcatDataset([dataset_of(8), dataset_of(9)], lazy_init=True)
    with pytest.raises(ValueError, match='ignore_index=8 of BaseSegDataset and ignore_index=9 of BaseSeg'):
        ignored_label(different)


@pytest.mark.parametrize(('counted', 'wrong'), [(255, True), (VOID, False), (None, False)])
def test_a_sampler_that_has_counted_another_label_is_named(void_data, tmp_path, counted, wrong):
    runner = run(config(void_data, **OF_HEAD), tmp_path.name)
    runner.train_loop.dataloader.sampler.ignore_index = counted
    if wrong:
        with pytest.raises(ValueError, match=r'InfiniteSampler has counted .*=255, but training ignores 254'):
            runner.train()
    else:
        runner.train()


RARE = dict(type='RareClassSampler', num_workers=0)


@pytest.mark.parametrize(
    ('said', 'sampler', 'wrong'),
    [
        ({'model.decode_head.ignore_index': 0}, RARE, True),
        ({'model.decode_head.ignore_index': 0}, dict(RARE, ignore_index=0), False),
        ({'train_dataloader.dataset.ignore_index': 0}, RARE, False),
        ({'model.decode_head.ignore_index': 0}, dict(RARE, ignore_index=255), True),
        ({'train_dataloader.dataset.ignore_index': 0}, dict(RARE, ignore_index=255), False),
        ({}, RARE, False),
    ],
)
@pytest.mark.parametrize('hooks', [None, []])
def test_rare_class_sampling_leaves_out_the_same_pixels_or_says_so(tmp_path, said, sampler, wrong, hooks):
    data = write_images(tmp_path / 'data', labels_with(0))
    cfg = config(data, **said, **{'val_evaluator.groups': dict(tail=['pole'])})
    cfg.custom_hooks = cfg.custom_hooks if hooks is None else hooks
    cfg.train_dataloader.sampler = sampler
    runner = run(cfg, tmp_path.name)
    if wrong:
        with pytest.raises(ValueError, match=r'RareClassSampler has counted .* but training ignores 0'):
            runner.train()
    else:
        runner.train()
        assert (runner.train_dataloader.sampler.probability[0] == 0) == bool(said)


def test_transforms_that_fill_labels_with_255_are_named(void_data, tmp_path):
    cfg = config(void_data, **OF_DATA)
    steps = [
        dict(type='RandomRotate', prob=0.0, degree=10),
        dict(type='Pad', size=(8, 6)),
        dict(type='RandomCutOut', prob=0.0, n_holes=1, cutout_shape=(1, 1), seg_fill_in=VOID),
    ]
    cfg.train_dataloader.dataset.pipeline[2:2] = steps
    runner = run(cfg, f'{tmp_path.name}-1')
    runner.train()
    assert 'Pad, RandomRotate may fill labels with 255' in log_of(runner)
    runner = run(config(void_data, **OF_DATA), f'{tmp_path.name}-2')
    runner.train()
    assert 'may fill labels' not in log_of(runner)


def ddr_head(make, ignore_index, loss):
    head = make(
        in_channels=4, channels=4, num_classes=3, ignore_index=ignore_index, loss_decode=[dict(type=loss)] * 2
    )
    return head.train()


@pytest.mark.parametrize('ignored', [0, 7])
@pytest.mark.parametrize('loss', ['WeightedCrossEntropyLoss', 'CrossEntropyLoss'])
def test_losses_of_a_head_that_does_not_pass_its_label_on_get_it(ignored, loss):
    torch.manual_seed(0)
    target = torch.randint(1, 3, (1, 8, 8))
    void = torch.rand(1, 8, 8) < 0.5
    target[void] = ignored
    logits = [torch.randn(1, 3, 8, 8) for _ in range(2)]
    expected = WeightedCrossEntropyLoss()(logits[0], target.masked_fill(void, 255))
    heads = [
        ddr_head(lambda **options: FeatureHead(base='DDRHead', **options), ignored, loss),
        ddr_head(DDRHead, 255, loss),
    ]
    give_ignored_label(torch.nn.ModuleDict(dict(decode_head=heads[1])), ignored)
    for head in heads:
        head._stack_batch_gt = lambda samples: target[:, None]
        with torch.no_grad():
            found = head.loss_by_feat(logits, [])['loss_context']
        if loss == 'CrossEntropyLoss':  # it divides by the ignored pixels too
            expected_here = expected * (~void).float().mean()
            torch.testing.assert_close(found, expected_here)
        else:
            torch.testing.assert_close(found, expected)


def test_losses_with_their_own_option_and_nested_heads_follow_but_edges_do_not():
    stdc = MODELS.build(
        dict(type='mmseg.STDCHead', in_channels=4, channels=4, num_classes=2, boundary_threshold=0.1)
    )
    loss = [dict(type='mmseg.TverskyLoss'), dict(type='mmseg.OhemCrossEntropy')]
    head = MODELS.build(HEAD | dict(loss_decode=loss))
    model = torch.nn.ModuleDict(dict(decode_head=head, auxiliary_head=stdc))
    changed = give_ignored_label(model, 7)
    assert changed == [
        'decode_head.ignore_index',
        'decode_head.loss_decode.0.ignore_index',
        'decode_head.loss_decode.1.ignore_label',
    ]
    assert stdc.ignore_index == 255


def test_the_page_of_subclasses_leaves_out_the_same_pixels(void_data, tmp_path):
    head = dict(HEAD, type='FeatureHead', base='FCNHead', loss_decode=dict(type='SubclassifiedLoss'))
    cfg = config(void_data, **OF_TRAINING)
    cfg.model.decode_head = head
    torch.save(dict(state_dict=MODELS.build(cfg.model).state_dict()), tmp_path / 'model.pth')
    with DefaultScope.overwrite_default_scope('mmseg'):
        model, *_ = load(cfg, 'CONFIG', str(tmp_path / 'model.pth'))
    assert model.decode_head.ignore_index == VOID


def agree_on_ranks(folder):
    cfg = config(folder, **OF_DATA | {'model.decode_head.ignore_index': 0})
    cfg.launcher = 'none'
    run(cfg, 'ranks').train()


@pytest.mark.slow
def test_all_ranks_raise_the_same(void_data):
    errors = on_ranks(2, agree_on_ranks, void_data)
    assert all(isinstance(error, ValueError) for error in errors), errors
    assert str(errors[0]) == str(errors[1])


def test_logit_adjustment_counts_with_the_same_label(void_data, tmp_path):
    cfg = config(void_data, **OF_DATA, custom_hooks=[dict(type='LogitAdjustmentHook', num_workers=0)])
    cfg.update(test_dataloader=cfg.val_dataloader, test_evaluator=EVALUATOR, test_cfg=dict(type='TestLoop'))
    runner = run(cfg, tmp_path.name)
    hook = next(hook for hook in runner.hooks if isinstance(hook, HOOKS.get('LogitAdjustmentHook')))
    hook.before_test(runner)
    head = runner.model.decode_head
    with torch.no_grad():
        shift = head.conv_seg.bias[:, None, None] - head.conv_seg(torch.zeros(1, 4, 1, 1))
    expected = torch.tensor([24, 8, 16]).div(48).log()
    torch.testing.assert_close(shift.flatten(), expected)


def test_in_a_test_the_label_is_that_of_the_data_set_tested(tmp_path):
    hub = MessageHub.get_instance(tmp_path.name)
    labels = dict(train=7, val=8, test=9)
    cfg = {f'{name}_dataloader': dict(dataset=dataset_of(label)) for name, label in labels.items()}
    for stage, label in labels.items():
        hub.update_info('loop_stage', stage)
        assert label_of_evaluation(cfg) == label


def test_a_metric_follows_the_data_set_that_it_evaluates():
    metric = SimpleNamespace(ignore_index=None, expect=None, dataset_meta=None)
    loop = SimpleNamespace(
        dataloader=SimpleNamespace(dataset=dataset_of(9)), evaluator=SimpleNamespace(metrics=[metric])
    )
    _check_metrics(SimpleNamespace(val_loop=loop), 255)
    assert metric.ignore_index == 9
