"""What is done between logits and labels of a test, in the order in which it acts."""

import itertools
import logging
import math
import os
import sys
from types import SimpleNamespace

from mmseg_imbalance.registry import HOOKS, MODELS

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import recoloured
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from mmengine.structures import PixelData
from mmseg.registry import DATASETS
from mmseg.structures import SegDataSample
from ranks import on_ranks
from rankseg import RankSEG
from scripted import log_of
from torch import nn

from mmseg_imbalance.compat import adapt_to_cpu
from mmseg_imbalance.components import remove_small
from mmseg_imbalance.counting import count_classes
from mmseg_imbalance.decisions import RULES, DecisionHook, LogitAdjustmentHook, mend_merged_threshold
from mmseg_imbalance.frequency import ClassFrequency
from mmseg_imbalance.trained import classifying_head
from mmseg_imbalance.weighting import log_prior

BALANCED = 'segformer/segformer_mit-b0-small-combined_1xb8-2k_camvid-240x180'
TWO_HEADS = 'deeplabv3/deeplabv3_r18-d8-small-combined_1xb8-2k_camvid-240x180'


@HOOKS.register_module(force=True)
class KeepSamples(Hook):
    """Keeps what the loop has handed to the metrics."""

    def before_test(self, runner):
        self.samples = []

    def after_test_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.samples += outputs


COUNT = itertools.count()


def run_test(cfg, *hooks):
    """A runner after the test of a model of chance, and the samples that the metrics got."""
    keep = KeepSamples()
    cfg.experiment_name = f'{cfg.experiment_name}-{next(COUNT)}'
    torch.manual_seed(3)
    runner = Runner.from_cfg(cfg)
    for hook in (*hooks, keep):
        runner.register_hook(hook)
    head = classifying_head(runner.model, 'this test')
    nn.init.normal_(head.conv_seg.weight)  # many small regions, of classes that are not sure
    runner.test()
    assert all(sample.pred_sem_seg.data.unique().numel() > 1 for sample in keep.samples)
    return runner, keep.samples


def ranked(probabilities, metric='iou'):
    """(C, H, W) -> (1, H, W), without the hook."""
    return RankSEG(metric=metric, solver='RMA', output_mode='multiclass')(probabilities[None])


# Logit adjustment


def probabilities(cfg, **options):
    """Of the first val image, by a model of seed 0, and the text of the log."""
    cfg.merge_from_dict(options)
    runner = Runner.from_cfg(cfg)
    torch.manual_seed(3)
    for parameter in runner.model.parameters():
        nn.init.normal_(parameter, std=0.1)
    seen = []
    assert runner.test_loop  # is built now
    postprocess = runner.model.postprocess_result
    runner.model.postprocess_result = lambda z, samples: (seen.append(z), postprocess(z, samples))[1]
    runner.test()
    return seen[0], log_of(runner)


@pytest.mark.parametrize('name', [BALANCED, TWO_HEADS])
def test_logit_adjustment_after_training_shifts_the_logits_by_the_log_prior(small_config, name):
    plain, _ = probabilities(small_config(name))
    hook = dict(type='LogitAdjustmentHook', tau=0.7)
    cfg = small_config(name)
    adjusted, log = probabilities(cfg, custom_hooks=[hook], experiment_name=f'{cfg.experiment_name}-2')
    prior = log_prior(count_classes(DATASETS.build(cfg.train_dataloader.dataset)).pixels)
    expected = plain - 0.7 * torch.from_numpy(prior).float()[:, None, None]
    torch.testing.assert_close(adjusted, expected, rtol=1e-4, atol=1e-4)
    assert '0.7 * ln f_c is subtracted' in log
    assert 'on top of it' not in log


def test_a_class_that_the_sample_of_logit_adjustment_did_not_meet_is_named(small_config, camvid, tmp_path):
    root = recoloured(camvid, tmp_path / 'camvid', 10)
    hook = dict(type='LogitAdjustmentHook', max_images=2)
    cfg = small_config(BALANCED, custom_hooks=[hook])
    cfg.train_dataloader.dataset.data_root = root
    _, log = probabilities(cfg)
    assert 'not met in 2 of 4 images are taken for as rare as the rarest that was: bicyclist' in log
    for option in (dict(max_images=0), dict(num_workers=-1)):
        with pytest.raises(ValueError, match='must be a whole number, at least'):
            LogitAdjustmentHook(**option)


def test_logit_adjustment_twice_is_warned_of_and_a_foreign_head_refused(small_config):
    cfg = small_config(BALANCED, custom_hooks=[dict(type='LogitAdjustmentHook', tau=1.0)])
    cfg.model.decode_head.loss_decode.logit_adjustment = 0.5
    assert 'trained with logit_adjustment=0.5 already' in probabilities(cfg)[1]
    cfg = small_config(BALANCED, experiment_name=f'{cfg.experiment_name}-2')
    runner = Runner.from_cfg(cfg)
    hook = LogitAdjustmentHook()
    runner.cfg.pop('train_dataloader')
    with pytest.raises(ValueError, match='no train_dataloader; add one'):
        hook.before_test(runner)
    del runner.model.decode_head.conv_seg
    for foreign in (hook, DecisionHook('rankseg-dice')):
        with pytest.raises(TypeError, match=r'needs the logits of a conv_seg, which .* does not have'):
            foreign.before_test(runner)
    DecisionHook(remove_small=9).before_test(runner)  # any model has labels
    with pytest.raises(ValueError, match='tau must be a finite number, got nan'):
        LogitAdjustmentHook(tau=float('nan'))


class Classifier(nn.Module):
    """The end of a decode head."""

    def __init__(self, num_classes, out_channels):
        super().__init__()
        self.conv_seg = nn.Conv2d(3, out_channels, 1)
        self.num_classes, self.out_channels = num_classes, out_channels

    def forward(self, features):
        return self.conv_seg(features)


@pytest.fixture
def counted(monkeypatch):
    """A runner that tests a head, after data of two classes of 30 and 10 pixels."""
    frequency = ClassFrequency.from_rows(['sky', 'road'], [[30, 10]], [0], ['0.png'])
    monkeypatch.setattr('mmseg_imbalance.decisions.training_frequency', lambda *_, **__: frequency)

    def runner(head):
        logger = logging.getLogger('adjusted')
        return SimpleNamespace(model=nn.ModuleDict(dict(decode_head=head)), cfg={}, logger=logger)

    return runner


def test_the_logit_of_a_single_channel_is_adjusted_as_the_difference_of_two(counted):
    features = torch.randn(2, 3, 5, 7)
    single, both = Classifier(2, 1), Classifier(2, 2)
    before, of_two = single(features), both(features)
    for head in (single, both):
        LogitAdjustmentHook(tau=0.5).before_test(counted(head))
    torch.testing.assert_close(single(features), before + 0.5 * math.log(3))
    change = both(features) - of_two
    torch.testing.assert_close(change[:, 1:] - change[:, :1], single(features) - before)


def test_logit_adjustment_acts_once_and_ends_with_the_test(counted):
    head, features = Classifier(2, 2), torch.randn(2, 3, 5, 7)
    before, hook = head(features), LogitAdjustmentHook()
    for _ in range(2):  # the first test ended in an error
        hook.before_test(counted(head))
    torch.testing.assert_close(head(features), before - torch.tensor([0.75, 0.25]).log()[:, None, None])
    hook.after_test(None)
    assert torch.equal(head(features), before)
    hook.before_test(counted(head))
    with pytest.raises(RuntimeError, match='the last decode head does not call its conv_seg'):
        hook.after_test(None)
    assert torch.equal(head(features), before)


def test_logit_adjustment_of_other_classes_than_those_of_training_is_refused(counted):
    with pytest.raises(ValueError, match=r"2 classes, \['sky', 'road'\], but Classifier predicts 3"):
        LogitAdjustmentHook().before_test(counted(Classifier(3, 3)))


# Rules


def expected_iou(p):
    """{labels: mean expected IoU of the classes}, by all truths that independent pixels may have."""
    pixels, classes = p.shape
    masks = list(itertools.product((0, 1), repeat=pixels))
    value = {}
    for c in range(classes):
        chance = [np.prod([p[i, c] if bit else 1 - p[i, c] for i, bit in enumerate(mask)]) for mask in masks]
        for chosen in masks:
            overlap = (
                sum(a & b for a, b in zip(chosen, truth, strict=True))
                / (sum(a | b for a, b in zip(chosen, truth, strict=True)) or 1)
                for truth in masks
            )
            value[c, chosen] = sum(w * iou for w, iou in zip(chance, overlap, strict=True))
    return {
        labels: np.mean([value[c, tuple(int(label == c) for label in labels)] for c in range(classes)])
        for labels in itertools.product(range(classes), repeat=pixels)
    }


def decide(hook, logits):
    """The labels of an image from its logits (C, H, W), as the test of a plain model decides them."""
    sample = SegDataSample()
    single = len(logits) == 1
    predicted = (logits > 0).to(logits) if single else logits.argmax(0, keepdim=True)
    sample.seg_logits = PixelData(data=logits.sigmoid() if single else logits)
    sample.pred_sem_seg = PixelData(data=predicted)
    hook._decide(sample, [sample])
    assert sample.pred_sem_seg.data.dtype == predicted.dtype
    assert sample.pred_sem_seg.data.shape == predicted.shape
    return sample.pred_sem_seg.data


# three sure pixels of class 0, two that lean to it and one that leans to the rare class 1
UNSURE = torch.tensor([0.05, 0.05, 0.05, 0.45, 0.45, 0.6])


@pytest.mark.parametrize('channels', [1, 2])
def test_the_labels_of_highest_expected_iou_are_found_where_argmax_misses_them(channels):
    p = torch.stack([1 - UNSURE, UNSURE], 1)
    value = expected_iou(p.double().numpy())
    best = max(value, key=value.get)
    assert best == (0, 0, 0, 1, 1, 1)
    logit = UNSURE.logit().reshape(1, 2, 3)
    logits = logit if channels == 1 else torch.cat([torch.zeros_like(logit), logit])
    by_class = decide(DecisionHook(), logits)
    assert by_class.flatten().tolist() == [0, 0, 0, 0, 0, 1]
    assert value[best] > value[0, 0, 0, 0, 0, 1] + 0.02
    assert tuple(decide(DecisionHook('rankseg-iou'), logits).flatten().tolist()) == best


@pytest.mark.parametrize('rule', RULES)
def test_sure_pixels_keep_their_class(rule):
    labels = torch.randint(4, (1, 13, 17), generator=torch.Generator().manual_seed(0))
    logits = 20.0 * (torch.arange(4)[:, None, None] == labels)
    assert torch.equal(decide(DecisionHook(rule), logits), labels)
    assert torch.equal(decide(DecisionHook(rule), logits.half()), labels)


def test_iou_and_dice_are_two_rules():
    logits = 2 * torch.randn(5, 31, 37, generator=torch.Generator().manual_seed(0))
    found = [decide(DecisionHook(rule), logits) for rule in RULES]
    for metric, labels in zip(('iou', 'dice'), found[1:], strict=True):
        assert torch.equal(labels, ranked(logits.softmax(0), metric))
    assert all((a != b).any() for a, b in itertools.combinations(found, 2))


def test_what_is_no_rule_and_no_area_is_refused(monkeypatch):
    with pytest.raises(ValueError, match=r"rule must be one of \('argmax', .*got 'rankseg'"):
        DecisionHook('rankseg')
    for area in (0, -3, 2.0, '5', None, True):
        with pytest.raises(ValueError, match=f'at least 1, got {area!r}'):
            DecisionHook(remove_small=area)
    monkeypatch.setitem(sys.modules, 'rankseg', None)
    DecisionHook('argmax', remove_small=5)
    with pytest.raises(ImportError, match=r"'rankseg-iou' needs .*mmseg-imbalance\[rankseg\]"):
        DecisionHook('rankseg-iou')


# In a test


WINDOWS = dict(mode='slide', crop_size=(48, 48), stride=(32, 32))


@pytest.mark.parametrize(
    ('name', 'test_cfg'),
    [(BALANCED, dict(mode='whole')), (BALANCED, WINDOWS), (TWO_HEADS, dict(mode='whole'))],
    ids=['whole', 'slide', 'two-heads'],
)
def test_the_metrics_get_the_labels_that_the_rule_makes_of_the_resized_logits(small_config, name, test_cfg):
    def config():
        cfg = small_config(name)
        cfg.model.test_cfg = test_cfg
        cfg.test_dataloader.batch_size = 2
        return cfg

    _, plain = run_test(config())
    runner, decided = run_test(config(), DecisionHook('rankseg-iou'))
    assert len(decided) == 2
    for before, after in zip(plain, decided, strict=True):
        assert after.seg_logits.shape == after.gt_sem_seg.shape == (72, 96)  # the image is tested at (64, 85)
        assert torch.equal(after.seg_logits.data, before.seg_logits.data)
        assert torch.equal(after.pred_sem_seg.data, ranked(before.seg_logits.data.softmax(0)))
        assert (after.pred_sem_seg.data != before.pred_sem_seg.data).any()
    assert 'test_step' not in vars(runner.model)  # it decides by itself again


@pytest.mark.parametrize(
    ('hook', 'warned'),
    [
        (dict(type='DecisionHook', rule='argmax', remove_small=5), None),
        (dict(type='DecisionHook', rule='rankseg-iou'), 'rankseg-iou'),
        (dict(type='LogitAdjustmentHook', tau=0.5), 'LogitAdjustmentHook with tau=0.5'),
    ],
)
def test_a_checkpoint_of_fit_bias_is_not_corrected_twice_in_silence(small_config, tmp_path, hook, warned):
    cfg = small_config(BALANCED)
    model = MODELS.build(cfg.model)
    torch.save(dict(state_dict=model.state_dict(), meta=dict(class_bias=[0.0])), tmp_path / 'bias.pth')
    cfg.load_from = str(tmp_path / 'bias.pth')
    cfg.custom_hooks = [hook]
    runner = Runner.from_cfg(cfg)
    runner.test()
    assert ('comes on top of the class bias' in log_of(runner)) == bool(warned)
    assert not warned or f'{warned} comes on top of the class bias' in log_of(runner)


def augmented(cfg):
    views = [
        [dict(type='Resize', scale_factor=factor, keep_ratio=True) for factor in (0.75, 1.0)],
        [dict(type='RandomFlip', prob=float(flip), direction='horizontal') for flip in (0, 1)],
        [dict(type='LoadAnnotations')],
        [dict(type='PackSegInputs')],
    ]
    cfg.test_dataloader.dataset.pipeline = [
        dict(type='LoadImageFromFile'),
        dict(type='TestTimeAug', transforms=views),
    ]
    cfg.model = dict(type='SegTTAModel', module=cfg.model)
    return cfg


def test_with_augmentation_the_rule_gets_the_mean_probabilities_of_all_views(small_config):
    runner, decided = run_test(augmented(small_config(BALANCED)), DecisionHook('rankseg-iou', remove_small=9))
    assert 'merge_preds' not in vars(runner.model)
    for data, sample in zip(runner.test_dataloader, decided, strict=True):
        assert len(data['inputs']) == 4
        views = [
            runner.model.module.test_step(dict(inputs=inputs, data_samples=samples))[0]
            for inputs, samples in zip(data['inputs'], data['data_samples'], strict=True)
        ]
        logits = torch.stack([view.seg_logits.data for view in views])
        assert not torch.allclose(logits[0], logits[1])
        labels = ranked(logits.softmax(1).mean(0))
        expected = remove_small(labels[0].numpy(), 9)
        assert np.array_equal(sample.pred_sem_seg.data[0].numpy(), expected)
        assert not np.array_equal(labels[0].numpy(), expected)


def with_one_channel(cfg, threshold):
    cfg.model.decode_head.update(num_classes=2, out_channels=1, threshold=threshold)
    cfg.test_evaluator = dict(type='IoUMetric', iou_metrics=['mIoU'], ignore_index=255)
    for split in ('train', 'val', 'test'):
        cfg[f'{split}_dataloader'].dataset.metainfo = dict(classes=('sky', 'building'))
    return cfg


def test_with_augmentation_a_single_channel_is_held_against_its_threshold(small_config):
    """MMSegmentation's merge takes the sigmoid twice: no pixel is below 0.5."""
    cfg = with_one_channel(small_config(BALANCED), threshold=0.5)

    class Mend(Hook):
        def before_test(self, runner):
            mend_merged_threshold(runner.model)

    runner, samples = run_test(augmented(cfg), Mend())
    for data, sample in zip(runner.test_dataloader, samples, strict=True):
        views = [
            runner.model.module.test_step(dict(inputs=inputs, data_samples=each))[0].seg_logits.data
            for inputs, each in zip(data['inputs'], data['data_samples'], strict=True)
        ]
        p = torch.stack(views).mean(0)
        assert 0 < p.min() < 0.5 < p.max() < 1
        assert torch.equal(sample.pred_sem_seg.data, (p > 0.5).to(p))


def labels_of_rank(text):
    """{image: labels} of this rank, and whether MMEngine's wrapper was tested."""
    cfg = Config.fromstring(text, '.py')
    cfg.launcher = 'pytorch'
    os.environ.update(LOCAL_RANK=str(dist.get_rank()), RANK=str(dist.get_rank()), WORLD_SIZE='2')
    adapt_to_cpu(cfg)
    runner, samples = run_test(cfg, DecisionHook('rankseg-iou'))
    labels = {sample.img_path: sample.pred_sem_seg.data.numpy() for sample in samples}
    return labels, is_model_wrapper(runner.model)


@pytest.mark.slow
@pytest.mark.parametrize('change', [lambda cfg: cfg, augmented], ids=['whole', 'augmented'])
def test_two_ranks_decide_as_one_process(small_config, change):
    _, alone = run_test(change(small_config(BALANCED)), DecisionHook('rankseg-iou'))
    ranks = on_ranks(2, labels_of_rank, change(small_config(BALANCED)).pretty_text)
    assert [(len(labels), wrapped) for labels, wrapped in ranks] == [(1, True)] * 2
    together = ranks[0][0] | ranks[1][0]
    assert len(together) == len(alone) == 2
    for sample in alone:
        assert np.array_equal(together[sample.img_path], sample.pred_sem_seg.data.numpy())


def test_a_head_of_one_channel_is_decided_by_both_classes(small_config):
    cfg = with_one_channel(small_config(BALANCED), threshold=0.3)
    _, decided = run_test(cfg, DecisionHook('rankseg-dice'))
    for sample in decided:
        p = sample.seg_logits.data
        assert torch.equal(sample.pred_sem_seg.data, ranked(torch.cat([1 - p, p]), 'dice').to(p))


@pytest.mark.parametrize('reverse', [False, True])
def test_the_order_is_logits_then_rule_then_regions_whatever_the_order_of_the_hooks(small_config, reverse):
    hooks = [LogitAdjustmentHook(tau=0.7), DecisionHook('rankseg-iou'), DecisionHook(remove_small=9)]
    _, plain = run_test(small_config(BALANCED))
    cfg = small_config(BALANCED)
    _, decided = run_test(cfg, *(hooks[1::-1] + hooks[2:] if reverse else hooks))
    prior = log_prior(count_classes(DATASETS.build(cfg.train_dataloader.dataset)).pixels)
    for before, after in zip(plain, decided, strict=True):
        logits = before.seg_logits.data - 0.7 * torch.from_numpy(prior).float()[:, None, None]
        torch.testing.assert_close(after.seg_logits.data, logits, rtol=1e-4, atol=1e-4)
        labels = ranked(after.seg_logits.data.softmax(0))[0].numpy()
        assert np.array_equal(after.pred_sem_seg.data[0].numpy(), remove_small(labels, 9))
        assert not np.array_equal(after.pred_sem_seg.data[0].numpy(), labels)


@pytest.mark.parametrize('area', [2, 6])
@pytest.mark.parametrize('dtype', [torch.int64, torch.uint8, torch.float32, torch.float16, torch.bfloat16])
def test_small_regions_of_every_prediction_are_removed_and_nothing_else(dtype, area):
    """Binary heads predict 0 and 1 in the dtype of the logits."""
    maps = (torch.rand(3, 1, 13, 17, generator=torch.Generator().manual_seed(0)) < 0.2).to(dtype)
    hook = DecisionHook(remove_small=area)
    for labels in maps:
        sample = SegDataSample(metainfo=dict(img_path='a.png'))
        sample.pred_sem_seg = PixelData(data=labels.clone())
        sample.gt_sem_seg = PixelData(data=labels.clone())
        hook._decide(sample, [sample])
        expected = remove_small(labels[0].long().numpy(), area)
        assert sample.pred_sem_seg.data.dtype == dtype
        assert torch.equal(sample.pred_sem_seg.data[0].long(), torch.from_numpy(expected))
        assert not torch.equal(sample.pred_sem_seg.data, labels)
        assert torch.equal(sample.gt_sem_seg.data, labels)
