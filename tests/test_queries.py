import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from conftest import REPOSITORY
from mmengine.config import Config
from mmengine.logging import MessageHub
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from mmengine.runner import Runner
from scripted import log_of
from torch import nn
from torch.nn import functional as F

from mmseg_imbalance.class_weight import WeightRecord
from mmseg_imbalance.counting import count_classes
from mmseg_imbalance.queries import QueryClassLoss
from mmseg_imbalance.weighting import class_weights, scheduled_weights

PLAIN = 'segformer/segformer_mit-b0-small_1xb8-2k_camvid-240x180'
CLASSES = 11


def queries(number=17, classes=5):
    """(cls_score, label, weight): the last label is "no object", and class 1 is nobody's."""
    generator = torch.Generator().manual_seed(0)
    cls_score = 2 * torch.randn(number, classes + 1, generator=generator)
    label = torch.randint(0, classes + 1, (number,), generator=generator)
    label[label == 1] = classes
    return cls_score, label, torch.randint(0, 3, (number,), generator=generator)


def test_it_is_cross_entropy_with_the_weight_of_no_object_last():
    cls_score, label, _ = queries()
    weights = [0.5, 3.0, 0.0, 1.5, 2.0]
    loss = QueryClassLoss(weights, [1.0] * 5 + [0.3], loss_weight=2.0)
    scores = [cls_score.clone().requires_grad_() for _ in range(2)]
    expected = 2 * F.cross_entropy(scores[0], label, torch.tensor([*weights, 0.3]))
    # what a head makes of its own class_weight
    value = loss(scores[1], label, torch.ones_like(label), avg_factor=torch.tensor(7.0))
    torch.testing.assert_close(value, expected)
    expected.backward()
    value.backward()
    torch.testing.assert_close(scores[1].grad, scores[0].grad)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_half_precision_is_summed_in_single(dtype):
    cls_score, label, _ = queries(500)
    cls_score = (100 * cls_score).to(dtype).requires_grad_()
    loss = QueryClassLoss([0.5, 3.0, 0.7, 1.5, 2.0])
    value = loss(cls_score, label)
    value.backward()
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(value.double(), loss(cls_score.detach().double(), label), rtol=1e-5, atol=0)
    assert cls_score.grad.isfinite().all()


def test_a_query_of_weight_k_is_k_queries():
    cls_score, label, weight = queries()
    loss = QueryClassLoss([0.5, 3.0, 0.7, 1.5, 2.0])
    repeated = loss(cls_score.repeat_interleave(weight, 0), label.repeat_interleave(weight))
    torch.testing.assert_close(loss(cls_score, label, weight), repeated)


def test_weights_come_as_in_every_other_loss(tmp_path):
    cls_score, label, _ = queries()
    names, weights = list('abcde'), [0.5, 1.0, 0.7, 1.0, 2.0]
    path = tmp_path / 'weights.json'
    WeightRecord(names, weights).save(path)
    MessageHub.get_current_instance().update_info('dataset_meta', dict(classes=names))
    expected = QueryClassLoss(weights)(cls_score, label)
    for given in (str(path), dict(a=0.5, c=0.7, e=2.0)):
        assert torch.equal(QueryClassLoss(given)(cls_score, label), expected)
    equal = F.cross_entropy(cls_score, label, torch.tensor([1.0] * 5 + [0.1]))
    torch.testing.assert_close(QueryClassLoss(None)(cls_score, label), equal)


def test_where_all_weights_are_0_the_loss_is_0():
    cls_score, label, _ = queries()
    cls_score.requires_grad_()
    loss = QueryClassLoss([1.0, 0, 0, 0, 0], [1.0] * 5 + [0.0])
    value = loss(cls_score, label.clamp_min(2))
    value.backward()
    assert value == 0
    assert (cls_score.grad == 0).all()


def test_auto_that_nobody_has_filled_says_so():
    cls_score, label, _ = queries()
    with pytest.raises(RuntimeError, match=r"QueryClassLoss\(object_weight='auto'\) has no weights yet"):
        QueryClassLoss()(cls_score, label)
    with pytest.raises(ValueError, match=r'object_weight holds 3 numbers.*predicts 5 classes'):
        QueryClassLoss([1.0, 1, 1])(cls_score, label)


def test_a_class_weight_of_other_classes_is_refused():
    cls_score, label, _ = queries()
    with pytest.raises(
        ValueError, match=r'has 4 numbers, but there are 5 classes.*write class_weight=\[1.0\] \* 5'
    ):
        QueryClassLoss(None, [1.0] * 3 + [0.1])(cls_score, label)
    loss = QueryClassLoss()
    with pytest.raises(ValueError, match='has 1 numbers, but there are 5 classes'):
        loss.check_classes(5)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(class_weight='auto'), "got 'auto'; the weights of the classes are object_weight"),
        (dict(class_weight=0.1), 'must be a list of 1 for each class.* got 0.1'),
        (dict(class_weight=[]), r'must be a list of 1 for each class.* got \[\]'),
        (dict(class_weight=[1.0, 2.0, 0.1]), r'got \[1.0, 2.0, 0.1\]; the weights of the classes are'),
        (dict(class_weight=[1.0, -0.1]), "the weight of 'no object' must be a finite number, at least 0"),
        (dict(loss_weight=-1.0), 'loss_weight must be a finite number, at least 0'),
        (dict(use_sigmoid=True), r'use_sigmoid must be one of \(False,\), got True'),
        (dict(reduction='sum'), r"reduction must be one of \('mean',\), got 'sum'"),
        (dict(object_weight=[1.0, -1.0]), r'object_weight=\[1.0, -1.0\] must be finite numbers'),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        QueryClassLoss(**options)


class TheirLoss(nn.Module):
    """Takes and keeps what MMDetection's CrossEntropyLoss does."""

    def __init__(self, use_sigmoid, loss_weight, reduction, class_weight):
        super().__init__()
        self.class_weight = class_weight

    def forward(self, cls_score, label, weight, avg_factor):
        return F.cross_entropy(cls_score, label, cls_score.new_tensor(self.class_weight))


class QueryHead(BaseModule):
    """Treats its class loss as MMDetection's query heads do; its queries are cells, its objects classes."""

    def __init__(self, in_channels, num_classes, loss_cls):
        super().__init__()
        self.num_classes = self.out_channels = num_classes
        self.align_corners, self.ignore_index = False, 255
        self.pool, self.cls_embed = nn.AdaptiveAvgPool2d(4), nn.Linear(in_channels, num_classes + 1)
        self.class_weight = loss_cls.class_weight
        self.loss_cls = MODELS.build(loss_cls)

    def forward(self, features):
        return self.cls_embed(self.pool(features[-1]).flatten(2).transpose(1, 2))  # (B, 16, C + 1)

    def loss(self, features, batch_data_samples, train_cfg):
        cls_scores = self(features)
        labels = torch.full(cls_scores.shape[:2], self.num_classes)
        for row, sample in zip(labels, batch_data_samples, strict=True):
            classes = sample.gt_sem_seg.data.unique()
            classes = classes[classes != self.ignore_index]
            row[: len(classes)] = classes
        labels = labels.flatten()
        class_weight = cls_scores.new_tensor(self.class_weight)
        ones, factor = torch.ones_like(labels), class_weight[labels].sum()
        return dict(loss_cls=self.loss_cls(cls_scores.flatten(0, 1), labels, ones, avg_factor=factor))

    def predict(self, features, batch_img_metas, test_cfg):
        scores = self(features)[..., :-1].transpose(1, 2).unflatten(2, (4, 4))
        return F.interpolate(scores, batch_img_metas[0]['img_shape'])


def query_config(small_config, loss_cls, hooks=(), **options):
    """A small run of the stand-in head; ``loss_cls`` is merged into what such configs have."""
    cfg = small_config(PLAIN, custom_hooks=list(hooks), **options)
    theirs = dict(use_sigmoid=False, loss_weight=2.0, reduction='mean', class_weight=[1.0] * CLASSES + [0.1])
    cfg.model.decode_head = dict(
        type=QueryHead,
        in_channels=cfg.model.decode_head.in_channels[-1],
        num_classes=CLASSES,
        loss_cls=theirs | loss_cls,
    )
    return cfg


def test_the_hook_fills_a_query_head_and_a_resumed_run_goes_on(small_config, tmp_path):
    schedule = [(0.0, 1.0), (0.5, 0.5)]
    hooks = [
        dict(type='ClassWeightHook', scheme='effective_num', power_schedule=schedule),
        dict(type='ClassBalanceHook', interval=1),
    ]
    loss_cls = dict(type='QueryClassLoss', object_weight='auto')
    cfg = query_config(small_config, loss_cls, hooks)
    cfg.default_hooks.checkpoint.interval = 1
    runner = Runner.from_cfg(cfg)
    runner.train()
    counted = class_weights(count_classes(runner.train_dataloader.dataset), 'effective_num')
    loss = runner.model.decode_head.loss_cls
    assert loss.object_weight.values.tolist() == pytest.approx(scheduled_weights(counted, schedule, 0.5))
    assert loss.no_object_weight == 0.1
    assert loss.loss_weight == 2
    assert 'effective_num weights for object_weight of decode_head.loss_cls' in log_of(runner)
    assert 'leaves' not in log_of(runner)

    cfg = query_config(small_config, loss_cls, hooks, resume=True, experiment_name=f'{tmp_path.name}-2')
    cfg.load_from = str(Path(cfg.work_dir, 'iter_1.pth'))
    resumed = Runner.from_cfg(cfg)
    resumed.train()
    assert 'weights of the checkpoint' in log_of(resumed)
    assert torch.equal(resumed.model.decode_head.loss_cls.object_weight.values, loss.object_weight.values)


@pytest.mark.parametrize('object_weight', ['auto', None])
def test_a_class_weight_of_other_classes_ends_before_training(small_config, object_weight):
    loss_cls = dict(type='QueryClassLoss', object_weight=object_weight, class_weight=[1.0, 1.0, 0.1])
    runner = Runner.from_cfg(query_config(small_config, loss_cls, [dict(type='ClassWeightHook')]))
    with pytest.raises(ValueError, match=f'has 3 numbers, but there are {CLASSES} classes'):
        runner.train()
    assert runner.iter == 0


def test_the_hook_leaves_their_loss_alone_and_names_ours(small_config):
    runner = Runner.from_cfg(query_config(small_config, dict(type=TheirLoss), [dict(type='ClassWeightHook')]))
    runner.train()
    assert 'leaves decode_head.loss_cls alone: the class_weight of TheirLoss stays as it is' in log_of(runner)
    assert 'ignored pixels' not in log_of(runner)
    assert runner.model.decode_head.loss_cls.class_weight == [1.0] * CLASSES + [0.1]


def test_their_loss_with_auto_ends_before_training(small_config):
    loss_cls = dict(type=TheirLoss, class_weight='auto')
    runner = Runner.from_cfg(query_config(small_config, loss_cls, [dict(type='ClassWeightHook')]))
    message = r"decode_head.loss_cls: TheirLoss does not know class_weight='auto'.*type='QueryClassLoss'"
    with pytest.raises(ValueError, match=message):
        runner.train()


def small(head, channels):
    """A shipped head made small: two layers, 16 channels, 20 queries."""
    head.update(in_channels=channels, feat_channels=16, out_channels=16, num_queries=20, num_classes=CLASSES)
    head.positional_encoding.num_feats = 8
    parts = [head.transformer_decoder]
    if 'encoder' in head.pixel_decoder:
        head.strides = [4, 8, 16, 32]
        head.pixel_decoder.positional_encoding.num_feats = 8
        head.pixel_decoder.norm_cfg.num_groups = 4
        parts.append(head.pixel_decoder.encoder)
        head.train_cfg.num_points = 64
    else:
        head.pixel_decoder.norm_cfg.num_groups = 4
    for part in parts:
        part.num_layers = 2
        for name, layer in part.layer_cfg.items():
            if name == 'ffn_cfg':
                layer.update(embed_dims=16, feedforward_channels=32)
            else:
                layer.update(embed_dims=16, num_heads=2)
    return head


CONFIG = """
_base_ = 'mmseg::{}.py'
model = dict(decode_head=dict(loss_cls=dict(type='QueryClassLoss', object_weight='auto')))
"""


@pytest.mark.skipif(find_spec('mmdet') is None, reason='MMDetection (onedl-mmdetection or mmdet) is absent')
@pytest.mark.parametrize(
    ('name', 'layers'),
    [
        ('maskformer/maskformer_r50-d32_8xb2-160k_ade20k-512x512', 2),
        ('mask2former/mask2former_r50_8xb2-90k_cityscapes-512x1024', 3),
    ],
)
def test_the_heads_of_mmdetection_train_with_it(small_config, tmp_path, name, layers):
    """The loss of each decoder layer is that of MMDetection's own, given the filled weights."""
    cfg = small_config(PLAIN, custom_hooks=[dict(type='ClassWeightHook')])
    path = tmp_path / 'query.py'
    path.write_text(CONFIG.format(name))
    head = small(Config.fromfile(path).model.decode_head, cfg.model.decode_head.in_channels)
    cfg.model.decode_head = head
    cfg.dump(path)
    done = subprocess.run(
        [sys.executable, REPOSITORY / 'tests' / 'query_heads.py', path],
        capture_output=True,
        text=True,
        env=os.environ
        | dict(PYTHONPATH=os.pathsep.join([str(REPOSITORY), os.environ.get('PYTHONPATH', '')])),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    counted = WeightRecord.load(Path(cfg.work_dir, 'class_weights.json')).weights
    assert seen['weights'] == pytest.approx([*counted, 0.1])
    assert len(set(counted)) > 5
    assert seen['loss_weight'] == head.loss_cls.loss_weight
    assert len(seen['values']) == 2 * layers
    for ours, theirs in seen['values']:
        assert ours == pytest.approx(theirs, rel=1e-5)


def test_the_loss_of_few_queries_without_an_object_is_their_mean():
    cls_score, label = torch.randn(3, 6), torch.full((3,), 5)
    expected = torch.nn.functional.cross_entropy(cls_score, label)
    torch.testing.assert_close(QueryClassLoss(None)(cls_score, label), expected)  # weights of 0.1 each
