"""Recall loss: the weights from recall, the running means, what checkpoints and averaged models hold."""

import copy
from pathlib import Path

import oracle
import pytest
import torch
import torch.nn.functional as F
from mmengine.model import ExponentialMovingAverage
from mmengine.runner import Runner
from test_losses import TARGET, head, run
from torch import nn

from mmseg_imbalance.class_balance import ClassWatcher
from mmseg_imbalance.losses import WeightedCrossEntropyLoss, WeightedLoss
from mmseg_imbalance.ops import soft_stats
from mmseg_imbalance.recall import MOST_CLASSES, RecallCrossEntropy, RecallWeightedLoss

WEIGHT = [0.2, 3.0, 1.0, 0.0, 1.7]


def missed_of(logits, target):
    """1 - recall of each class, 0 for one without a pixel; and the valid pixels."""
    valid = target != 255
    found = logits.argmax(1)
    of_class = [valid & (target == c) for c in range(logits.shape[1])]
    missed = [float((found[m] != target[m]).double().mean()) if m.any() else 0.0 for m in of_class]
    return torch.tensor(missed, dtype=torch.float64), valid


@pytest.mark.parametrize('weight', [None, WEIGHT])
@pytest.mark.parametrize('size', [(13, 17), (5, 7)])
@pytest.mark.parametrize('momentum', [1.0, 0.3])
def test_it_is_the_textbook_formula_over_several_batches(make_batch, weight, size, momentum):
    loss = RecallWeightedLoss(weight, momentum=momentum, loss_weight=2.0)
    given = [1.0] * 5 if weight is None else weight
    batches = []
    for seed in range(4):
        logits, target = make_batch(size, (13, 17), seed=seed)
        if seed == 1:
            target[target == 0] = 255  # a class is absent for a while
        if seed == 2:
            target.fill_(255)
        pixels = torch.rand(target.shape, dtype=torch.float64)
        batches.append(oracle.soft_stats(logits.numpy(), target.numpy(), pixel_weight=pixels.numpy()))
        value = loss(logits, target, weight=pixels)
        expected = oracle.recall_cross_entropy(batches, given, momentum)
        assert value.item() == pytest.approx(2 * expected, rel=1e-5, abs=1e-12)
    assert loss.loss_name == 'loss_recall'


def test_recall_has_no_gradient_and_ignored_pixels_have_no_effect(make_batch):
    logits, target = make_batch()
    logits = logits.requires_grad_()
    missed, valid = missed_of(logits, target)
    expected = F.cross_entropy(logits, target, missed, ignore_index=255, reduction='sum') / valid.sum()
    value = RecallWeightedLoss()(logits, target)
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
    (one,), (other,) = (torch.autograd.grad(x, logits) for x in (value, expected))
    torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-12)
    assert (one.movedim(1, 3)[~valid] == 0).all()
    changed = torch.where(valid[:, None], logits, torch.nan)
    torch.testing.assert_close(RecallWeightedLoss()(changed, target), value, rtol=0, atol=0)


def test_of_a_model_that_finds_nothing_it_is_cross_entropy_and_of_one_that_misses_nothing_0(make_batch):
    _, target = make_batch()
    right = F.one_hot(target.clamp(max=4), 5).movedim(3, 1).double()
    torch.testing.assert_close(
        RecallWeightedLoss(WEIGHT)(-right, target), WeightedCrossEntropyLoss(WEIGHT)(-right, target)
    )
    right.requires_grad_()
    value = RecallWeightedLoss()(right, target)
    value.backward()
    assert value == 0
    assert (right.grad == 0).all()


def test_a_class_that_the_batch_does_not_hold_adds_nothing_but_the_others_keep_their_weights(make_batch):
    logits, target = make_batch()  # without class 4
    stats = soft_stats(logits, target, with_recall=True)
    parts = RecallCrossEntropy().parts(stats, None)
    assert parts[4] == 0
    assert (parts[:4] > 0).all()
    fewer = soft_stats(logits, torch.where(target == 2, 255, target), with_recall=True)
    kept = RecallCrossEntropy().parts(fewer, None) * fewer.truth.sum() / stats.truth.sum()
    torch.testing.assert_close(kept[[0, 1, 3]], parts[[0, 1, 3]])


def test_a_pixel_of_weight_0_counts_in_the_recall_alone(make_batch):
    logits, target = make_batch()
    weight = torch.ones(target.shape)
    weight[:, :6] = 0
    missed, valid = missed_of(logits, target)
    nll = F.cross_entropy(logits, target, missed, ignore_index=255, reduction='none')
    expected = (nll * weight).sum() / (valid * weight).sum()
    torch.testing.assert_close(
        RecallWeightedLoss()(logits, target, weight=weight), expected, rtol=1e-6, atol=0
    )


def test_watched_it_needs_one_pass_and_its_term_stands_alone(make_batch, monkeypatch):
    passes = []

    def counted(*args, **options):
        passes.append(options)
        return soft_stats(*args, **options)

    monkeypatch.setattr('mmseg_imbalance.losses.soft_stats', counted)
    batch = make_batch()
    loss = RecallWeightedLoss(momentum=0.5)
    watcher = ClassWatcher()
    loss.watch(watcher)
    value = loss(*batch)
    assert len(passes) == 1
    pixels, right, parts, _ = watcher.sums
    torch.testing.assert_close(parts.sum(), value)
    assert pixels.sum() == (batch[1] != 255).sum()  # the numbers of the batch, not the running ones
    assert right.sum() == loss.correct.sum()
    term_alone = WeightedLoss(dict(recall=(RecallCrossEntropy(), 1.0)))
    torch.testing.assert_close(term_alone(*batch), value)


@pytest.mark.parametrize('momentum', [0.0, -0.1, 1.5, None])
def test_a_momentum_out_of_range_is_named(momentum):
    with pytest.raises(ValueError, match=rf'momentum must lie in \(0, 1\], got {momentum}'):
        RecallWeightedLoss(momentum=momentum)


def test_too_many_classes_for_running_means_are_named():
    logits = torch.zeros(1, MOST_CLASSES + 1, 2, 2)
    target = torch.zeros(1, 2, 2, dtype=torch.int64)
    with pytest.raises(
        ValueError, match=f'at most {MOST_CLASSES} classes, got {MOST_CLASSES + 1}; momentum=1'
    ):
        RecallWeightedLoss(momentum=0.1)(logits, target)
    assert RecallWeightedLoss()(logits, target) == 0  # argmax of equal logits is class 0


# the running means


def test_evaluation_takes_the_running_means_and_leaves_them_as_they_are(make_batch):
    loss = RecallWeightedLoss(momentum=0.3)
    loss(*make_batch(seed=0))
    before = loss.running_shares.clone()
    expected = copy.deepcopy(loss)(*make_batch(seed=1))
    loss.eval()
    torch.testing.assert_close(loss(*make_batch(seed=1)), expected)
    assert torch.equal(loss.running_shares, before)


def test_a_resumed_run_goes_on_with_the_means_of_its_checkpoint(make_batch):
    loss = RecallWeightedLoss(momentum=0.3)
    for seed in range(3):
        loss(*make_batch(seed=seed))
    resumed = RecallWeightedLoss(momentum=0.3)
    resumed.load_state_dict(copy.deepcopy(loss.state_dict()))
    for seed in range(3, 6):
        assert torch.equal(resumed(*make_batch(seed=seed)), loss(*make_batch(seed=seed)))
    assert not RecallWeightedLoss().state_dict()


@pytest.mark.parametrize('update_buffers', [False, True])
def test_in_an_averaged_model_every_buffer_stays_in_its_place(make_batch, update_buffers):
    model = nn.ModuleDict(dict(head=RecallWeightedLoss(momentum=0.3), norm=nn.BatchNorm2d(3)))
    averaged = ExponentialMovingAverage(model, momentum=0.5, update_buffers=update_buffers)
    for seed in range(3):
        model['head'](*make_batch(seed=seed))
        model['norm'](torch.randn(2, 3, 4, 5) + 7)
        averaged.update_parameters(model)
    own, copied = model.state_dict(), averaged.module.state_dict()
    assert own.keys() == copied.keys()
    assert own['head.running_shares'].any()
    if not update_buffers:
        assert all(torch.equal(own[name], copied[name]) for name in own)
    assert copied['norm.running_mean'].min() > 0.5


def test_in_a_model_of_half_precision_the_means_go_on_in_single(make_batch):
    loss, single = RecallWeightedLoss(momentum=0.01).half(), RecallWeightedLoss(momentum=0.01)
    for seed in range(20):
        batch = make_batch(seed=seed % 3, dtype=torch.float32)
        torch.testing.assert_close(loss(*batch), single(*batch))
    assert loss.running_shares.dtype == torch.float32


def test_training_follows_a_first_call_in_inference_mode(make_batch):
    loss = RecallWeightedLoss(momentum=0.3)
    logits, target = make_batch()
    with torch.inference_mode():
        loss(logits, target)
    loss(logits.requires_grad_(), target).backward()
    assert logits.grad.isfinite().all()


@pytest.mark.slow
def test_a_run_with_an_averaged_model_saves_the_means_and_resumes_with_them(small_config):
    cfg = small_config(
        'segformer/segformer_mit-b0-small-combined_1xb8-2k_camvid-240x180',
        custom_hooks=[dict(type='EMAHook')],
    )
    options = dict(type='RecallWeightedLoss', momentum=0.3)
    cfg.merge_from_dict(dict(model=dict(decode_head=dict(loss_decode=dict(_delete_=True, **options)))))
    cfg.default_hooks.checkpoint.interval = 2
    runner = Runner.from_cfg(cfg)
    runner.train()
    shares = runner.model.decode_head.loss_decode.running_shares
    assert shares.sum(1)[1].item() == pytest.approx(1 - 0.7**2, rel=1e-5)  # after two batches
    content = torch.load(Path(cfg.work_dir, 'iter_2.pth'), weights_only=False)
    for part in ('state_dict', 'ema_state_dict'):
        found = next(x for name, x in content[part].items() if name.endswith('loss_decode.running_shares'))
        assert torch.equal(found, shares)
    cfg.train_cfg.max_iters = 3
    cfg.load_from, cfg.resume = str(Path(cfg.work_dir, 'iter_2.pth')), True
    cfg.experiment_name += '-resumed'
    resumed = Runner.from_cfg(cfg)
    resumed.train()
    shares = resumed.model.decode_head.loss_decode.running_shares
    assert shares.sum(1)[1].item() == pytest.approx(1 - 0.7**3, rel=1e-5)


# in heads


@pytest.mark.parametrize('momentum', [1.0, 0.3])
def test_a_feature_head_and_mmsegmentation_s_give_the_same_loss_and_train(momentum):
    options = dict(type='RecallWeightedLoss', momentum=momentum)
    values, gradients = [], []
    for name in ('SegformerHead', 'FeatureSegformerHead'):
        decode_head = head(name, options)
        losses = run(decode_head, TARGET)
        assert set(losses) == {'loss_recall', 'acc_seg'}
        losses['loss_recall'].backward()
        values.append(losses['loss_recall'])
        gradients.append(decode_head.conv_seg.weight.grad)
        void = run(decode_head, torch.full_like(TARGET, 255))['loss_recall']
        assert void == 0
    torch.testing.assert_close(*values)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-7)
    assert gradients[0].abs().sum() > 0
