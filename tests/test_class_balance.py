"""ClassBalanceHook: what it reports of each class, that training does not notice, its picture."""

import copy
import json
import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.logging import MessageHub
from mmengine.runner import Runner
from PIL import Image
from ranks import on_ranks
from sklearn.metrics import recall_score
from torch import nn

from mmseg_imbalance.class_balance import ClassBalance, ClassBalanceHook, ClassWatcher
from mmseg_imbalance.losses import (
    CombinedWeightedLoss,
    GeneralizedDiceLoss,
    WeightedCrossEntropyLoss,
    WeightedDiceLoss,
    WeightedFocalLoss,
    WeightedJaccardLoss,
    WeightedTverskyLoss,
)
from mmseg_imbalance.plots import plot_class_balance
from mmseg_imbalance.subclass import SimilaritySubclassifiedLoss

BALANCED = 'segformer/segformer_mit-b0-small-combined_1xb8-2k_camvid-240x180'
TWO_HEADS = 'deeplabv3/deeplabv3_r18-d8-small-combined_1xb8-2k_camvid-240x180'
WEIGHT = [0.25, 3.0, 1.0, 0.5, 1.75]  # exact in single precision
CLASSES = ['road', 'car', 'pole', 'sky', 'rail']


class Model(nn.Module):
    """Heads with losses, as the hook finds them in a segmentor."""

    def __init__(self, **heads):
        super().__init__()
        for name, losses in heads.items():
            head = nn.Module()
            head.loss_decode = nn.ModuleList(losses) if isinstance(losses, list) else losses
            self.add_module(name, head)


class Watched:
    """A hook at work on a model, without the rest of a runner."""

    def __init__(self, model, interval=1, work_dir=None):
        self.records, self.warnings, self.images = [], [], []
        self.runner = SimpleNamespace(
            cfg=Config(),
            model=model.train(),
            hooks=[],
            iter=0,
            work_dir=work_dir,
            train_dataloader=SimpleNamespace(
                dataset=SimpleNamespace(metainfo=dict(classes=CLASSES)), sampler=None
            ),
            train_loop=None,
            val_loop=None,
            logger=SimpleNamespace(warning=self.warnings.append),
            message_hub=MessageHub.get_instance('watched'),
            visualizer=SimpleNamespace(
                add_scalars=lambda scalars, step: self.records.append((step, scalars)),
                add_image=lambda name, image, step: self.images.append((name, image, step)),
            ),
        )
        self.hook = ClassBalanceHook(interval)
        self.runner.hooks.append(self.hook)
        self.hook.before_train(self.runner)

    def iteration(self, step):
        """Run ``step``, which calls the losses and backward."""
        self.hook.before_train_iter(self.runner, self.runner.iter)
        step()
        self.hook.after_train_iter(self.runner, self.runner.iter)
        self.runner.iter += 1

    def last(self, kind, name='decode', classes=CLASSES):
        """Of the last report, (C,), NaN where there is none."""
        scalars = self.records[-1][1]
        return np.array([scalars.get(f'balance/{name}/{kind}/{c}', np.nan) for c in classes])


def share(values):
    values = np.asarray(values)
    return values / values.sum()


def pixel_parts(sums, weight, smoothing):
    parts, norm = np.zeros(5), 0.0
    for b in range(2):
        for c in range(5):
            parts[c] += (1 - smoothing) * weight[c] * sums['nll'][b, c]
            parts[c] -= smoothing / 5 * weight[c] * sums['log_prob'][b, c]
            norm += weight[c] * sums['truth'][b, c]
    return parts / norm


def region_parts(sums, weight, alpha, beta, smooth=1.0, gamma=1.0):
    parts = np.zeros(5)
    for b in range(2):
        for c in range(5):
            hit, area, truth = (sums[k][b, c] for k in ('intersection', 'prediction', 'truth'))
            index = (hit + smooth) / (hit + alpha * (area - hit) + beta * (truth - hit) + smooth)
            parts[c] += weight[c] * (1 - index) ** gamma / sum(weight) / 2
    return parts


def generalized_dice_parts(sums, weight, gamma, smooth=1.0):
    parts = np.zeros(5)
    for b in range(2):
        hit, area, truth = (sums[k][b] for k in ('intersection', 'prediction', 'truth'))
        scale = sum(truth) / sum(w * t for w, t in zip(weight, truth, strict=True))
        norm = sum(scale * weight[c] * (area[c] + truth[c]) for c in range(5)) + smooth
        errors = [scale * weight[c] * (area[c] + truth[c] - 2 * hit[c]) / norm for c in range(5)]
        for c in range(5):
            parts[c] += errors[c] / sum(errors) * sum(errors) ** gamma / 2
    return parts


def combined(sums, first=0.6, second=0.4):
    return first * pixel_parts(sums, WEIGHT, 0) + second * region_parts(sums, WEIGHT, 0.5, 0.5, 0.5)


LOSSES = {
    'ce': (WeightedCrossEntropyLoss, {}, lambda s: pixel_parts(s, WEIGHT, 0.0)),
    'smooth ce': (
        WeightedCrossEntropyLoss,
        dict(label_smoothing=0.2),
        lambda s: pixel_parts(s, WEIGHT, 0.2),
    ),
    'focal': (WeightedFocalLoss, dict(gamma=1.7), lambda s: pixel_parts(s, WEIGHT, 0.0)),
    'dice': (WeightedDiceLoss, {}, lambda s: region_parts(s, WEIGHT, 0.5, 0.5, 0.5)),
    'jaccard': (WeightedJaccardLoss, dict(gamma=0.8), lambda s: region_parts(s, WEIGHT, 1, 1, gamma=0.8)),
    'tversky': (
        WeightedTverskyLoss,
        dict(alpha=0.2, beta=0.9, gamma=1.3),
        lambda s: region_parts(s, WEIGHT, 0.2, 0.9, gamma=1.3),
    ),
    'gdice': (GeneralizedDiceLoss, {}, lambda s: generalized_dice_parts(s, WEIGHT, 1.0)),
    'gdice 1.4': (GeneralizedDiceLoss, dict(gamma=1.4), lambda s: generalized_dice_parts(s, WEIGHT, 1.4)),
    'combined': (CombinedWeightedLoss, {}, combined),
    'uncertainty': (
        CombinedWeightedLoss,
        dict(balance='uncertainty', ce_weight=0.7),
        lambda s: combined(s, 0.7),
    ),
    'similarity': (
        SimilaritySubclassifiedLoss,
        dict(threshold=2.0),
        lambda s: pixel_parts(s, WEIGHT, 0.0),
    ),
    'paper': (
        SimilaritySubclassifiedLoss,
        dict(threshold=2.0, paper_exact=True),
        lambda s: np.array(WEIGHT) * s['nll'].sum(0) / (2 * 13 * 17),
    ),
}


@pytest.mark.parametrize('case', LOSSES)
def test_shares_of_the_loss_are_those_of_plain_loops_and_add_up_to_it(make_batch, case):
    kind, options, parts = LOSSES[case]
    logits, target = make_batch((5, 7), (13, 17))
    gamma = options['gamma'] if case == 'focal' else 0.0
    sums = oracle.soft_stats(logits.numpy(), target.numpy(), focal_gamma=gamma)
    loss = kind(class_weight=WEIGHT, loss_weight=0.5, **options)
    watched = Watched(Model(decode_head=loss))
    values = []
    watched.iteration(lambda: values.append(loss(logits, target).item()))
    expected = parts(sums)
    np.testing.assert_allclose(watched.last('loss_share'), share(expected), rtol=1e-7)
    for kind in ('loss_share', 'pixel_share'):
        assert np.nansum(watched.last(kind)) == pytest.approx(1)
    constant = 0.5 * loss.balance.log_variance.sum().item() if case == 'uncertainty' else 0
    assert values[0] == pytest.approx(0.5 * (expected.sum() + constant), rel=1e-6)


@pytest.mark.parametrize('several', [False, True, 'gradnorm'])
def test_share_of_the_gradient_is_that_of_the_logits_of_the_total_loss(make_batch, several):
    first = CombinedWeightedLoss(class_weight=WEIGHT)
    losses = [first, WeightedDiceLoss(loss_weight=3.0)] if several else [first]
    if several == 'gradnorm':  # whose measurement is a backward of its own, after the first is watched
        measuring = CombinedWeightedLoss(class_weight=WEIGHT, balance=dict(type='gradnorm', interval=1))
        losses = [losses[1], measuring]
    watched = Watched(Model(decode_head=losses if several else first))
    features, target = make_batch((5, 7), (13, 17))
    features.requires_grad_()
    logits = 2 * features
    logits.retain_grad()
    watched.iteration(lambda: sum(loss(logits, target) for loss in losses).mul(1024).backward())
    norms = logits.grad.permute(1, 0, 2, 3).flatten(1).norm(dim=1)
    for name in ['decode.loss_combined', 'decode.loss_dice'] if several else ['decode']:
        np.testing.assert_allclose(watched.last('gradient_share', name), share(norms), rtol=1e-6)
        assert watched.last('gradient_share', name).sum() == pytest.approx(1)


@pytest.mark.parametrize('weighted', [False, True])
def test_pixels_and_recall_are_those_of_all_batches_since_the_last_report(make_batch, weighted):
    loss = WeightedCrossEntropyLoss()
    watched = Watched(Model(decode_head=loss), interval=3)
    truth, found = [], []
    for seed in range(6):
        logits, target = make_batch((5, 7), (13, 17), seed=seed)
        weight = torch.rand(target.shape) if weighted else None
        watched.iteration(lambda z=logits, y=target, w=weight: loss(z, y, weight=w))
        if seed >= 3:
            resized = F.interpolate(logits, (13, 17), mode='bilinear').argmax(1)
            truth.append(target[target != 255].numpy())
            found.append(resized[target != 255].numpy())
    truth, found = np.concatenate(truth), np.concatenate(found)
    assert [step for step, _ in watched.records] == [3, 6]
    np.testing.assert_allclose(watched.last('pixel_share'), share(np.bincount(truth, minlength=5)), rtol=1e-6)
    expected = recall_score(truth, found, labels=range(4), average=None)
    np.testing.assert_allclose(watched.last('recall'), [*expected, np.nan], rtol=1e-6)
    assert 'balance/decode/recall/rail' not in watched.records[-1][1]  # it never occurs


@pytest.mark.parametrize('option', ['logit_adjustment', 'logit_variation'])
def test_a_loss_that_changes_the_logits_has_no_recall(make_batch, option):
    loss = WeightedCrossEntropyLoss(**{option: 1.0})
    loss.class_weight.set_pixels([1000, 10, 10, 5, 1])
    watched = Watched(Model(decode_head=loss))
    watched.iteration(lambda: loss(*make_batch()))
    assert not any('recall' in key for key in watched.records[0][1])
    assert np.isfinite(watched.last('loss_share')).all()


def test_one_output_channel_is_two_classes_and_sampled_points_are_pixels():
    loss = WeightedCrossEntropyLoss()
    watched = Watched(Model(decode_head=loss))
    logits = torch.tensor([[[-1.0, 2.0, 3.0, 0.5]]], requires_grad=True)
    target = torch.tensor([[0, 0, 1, 255]])
    watched.iteration(lambda: loss(logits, target).backward())
    two = CLASSES[:2]
    np.testing.assert_allclose(watched.last('pixel_share', classes=two), [2 / 3, 1 / 3], rtol=1e-6)
    np.testing.assert_allclose(watched.last('recall', classes=two), [1 / 2, 1])
    np.testing.assert_allclose(watched.last('gradient_share', classes=two), [0.5, 0.5])


def test_losses_are_named_as_in_the_log():
    ce = WeightedCrossEntropyLoss
    model = Model(decode_head=[ce(), WeightedDiceLoss(), ce()])
    model.auxiliary_head = nn.ModuleList([Model(x=ce()).x, Model(x=nn.CrossEntropyLoss()).x, Model(x=ce()).x])
    assert list(Watched(model).hook.losses) == [
        'decode.loss_ce',
        'decode.loss_dice',
        'decode.loss_ce_2',
        'aux_0',
        'aux_2',
    ]


def test_without_a_loss_of_this_package_there_is_one_warning():
    watched = Watched(Model(decode_head=nn.CrossEntropyLoss()))
    for _ in range(2):
        watched.iteration(lambda: None)
    watched.hook.after_train(watched.runner)
    (warning,) = watched.warnings
    assert 'nothing to watch' in warning
    assert 'WeightedCrossEntropyLoss' in warning
    assert not watched.records + watched.images


def test_losses_are_watched_in_training_alone_and_can_be_copied_and_pickled(make_batch):
    loss = CombinedWeightedLoss()
    watched = Watched(Model(decode_head=loss), interval=10)
    watched.iteration(lambda: loss(*make_batch()))
    before = loss.watchers[0].sums.clone()
    loss.eval()(*make_batch())
    loss.train()
    assert torch.equal(loss.watchers[0].sums, before)
    for copied in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
        copied(*make_batch())
        assert torch.equal(copied.watchers[0].sums[:3], 2 * before[:3])
    assert torch.equal(loss.watchers[0].sums, before)
    watched.hook.after_train(watched.runner)
    assert loss.watchers == []


def test_nothing_waits_for_the_device_between_reports(make_batch, monkeypatch):
    class Scalars(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
                reads.append(function)
            return function(*args, **(kwargs or {}))

    reads = []
    for name in ('tolist', 'cpu', 'numpy'):
        own = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda *args, own=own, **kwargs: (reads.append(own), own(*args, **kwargs))[1]
        )

    def reads_of_iterations(watch):
        loss = CombinedWeightedLoss(backend='eager')
        logits, target = make_batch((5, 7), (13, 17))
        logits.requires_grad_()
        watched = Watched(Model(decode_head=loss if watch else nn.Identity()), interval=3)
        counts = []
        for _ in range(6):
            reads.clear()
            with Scalars():
                watched.iteration(lambda: loss(logits, target).backward())
            counts.append(len(reads))
        return counts

    more = np.subtract(reads_of_iterations(True), reads_of_iterations(False))
    assert more.tolist() == [0, 0, 2, 0, 0, 2]  # how many classes, of the host's own memory, and the sums


def reported(batches):
    """What a rank that sees these batches has recorded."""
    torch.manual_seed(0)
    loss = WeightedDiceLoss(class_weight=WEIGHT)
    watched = Watched(Model(decode_head=loss), interval=2)
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else None
    for step in batches:
        ours = step if rank is None else step[rank : rank + 1]
        watched.iteration(lambda ours=ours: sum(loss(z.requires_grad_(), y) for z, y in ours).backward())
    return watched.records


@pytest.mark.slow
def test_two_ranks_report_the_pixels_of_both(make_batch):
    batches = [[make_batch((5, 7), (13, 17), seed=2 * i + r) for r in range(2)] for i in range(2)]
    main, other = on_ranks(2, reported, batches)
    assert not other
    ((step, expected),) = reported(batches)
    assert [s for s, _ in main] == [step] == [2]
    assert main[0][1] == pytest.approx(expected, rel=1e-6)


def reported_without_labels_on_one(batch):
    """What a rank has recorded where only the first calls its loss before the first report."""
    loss = WeightedDiceLoss()
    watched = Watched(Model(decode_head=loss))
    logits, target = batch
    for step in range(2):
        calls = torch.distributed.get_rank() == 0 or step == 1
        watched.iteration(lambda calls=calls: calls and loss(logits.requires_grad_(), target).backward())
    return watched.records


@pytest.mark.slow
def test_a_rank_that_has_not_called_the_loss_holds_nobody_up(make_batch):
    main, _ = on_ranks(2, reported_without_labels_on_one, make_batch())
    (_, first), (_, second) = main
    assert first.keys() == second.keys()
    assert first['balance/decode/recall/road'] == pytest.approx(second['balance/decode/recall/road'])


def run(small_config, tmp_path, hook, name=BALANCED, **options):
    cfg = small_config(name, **options)
    label = f'{tmp_path.name}-{hook}'
    cfg.experiment_name = cfg.visualizer.name = label
    cfg.work_dir = str(tmp_path / label)
    cfg.train_cfg.max_iters = 4
    cfg.custom_hooks.append(dict(type='EMAHook'))
    if hook:
        cfg.custom_hooks.append(dict(type='ClassBalanceHook', interval=2))
    cfg.default_hooks.checkpoint.interval = 2
    runner = Runner.from_cfg(cfg)
    runner.train()
    return runner


def records_of(runner):
    lines = Path(runner._log_dir, 'vis_data', 'scalars.json').read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_training_is_bitwise_as_without_it(small_config, tmp_path):
    options = dict(optim_wrapper=dict(accumulative_counts=2))
    states = []
    for hook in (False, True):
        runner = run(small_config, tmp_path, hook, **options)
        saved = torch.load(Path(runner.work_dir, 'iter_4.pth'), weights_only=False)
        states.append((saved['state_dict'] | saved['ema_state_dict'], torch.get_rng_state()))
        losses = [record['loss'] for record in records_of(runner) if 'loss' in record]
        assert len(losses) == 4
    (without, random), (beside, same) = states
    assert torch.equal(random, same)
    assert without.keys() == beside.keys()
    for name, value in without.items():
        assert torch.equal(value, beside[name]), name


def test_a_run_leaves_scalars_of_every_head_and_a_picture(small_config, tmp_path):
    runner = run(small_config, tmp_path, True, TWO_HEADS)
    reports = [record for record in records_of(runner) if 'balance/decode/pixel_share/sky' in record]
    assert [record['step'] for record in reports] == [2, 4]
    classes = runner.train_dataloader.dataset.metainfo['classes']
    for record in reports:
        assert 'loss' not in record
        for head in ('decode', 'aux'):
            for kind in ('pixel_share', 'loss_share', 'gradient_share'):
                values = [record[f'balance/{head}/{kind}/{c}'] for c in classes]
                assert sum(values) == pytest.approx(1, rel=1e-5)
                assert min(values) >= 0
        assert record['balance/decode/pixel_share/car'] == record['balance/aux/pixel_share/car']
        assert record['balance/decode/loss_share/car'] != record['balance/aux/loss_share/car']
    picture = np.array(Image.open(Path(runner.work_dir, 'class_balance.png')))
    shown = Path(runner._log_dir, 'vis_data', 'vis_image', 'class_balance_4.png')
    np.testing.assert_array_equal(picture[..., :3], np.array(Image.open(shown)))
    assert not any(getattr(module, 'watchers', ()) for module in runner.model.modules())


def test_a_run_shorter_than_the_interval_ends_without_a_picture(make_batch, tmp_path):
    loss = WeightedCrossEntropyLoss()
    watched = Watched(Model(decode_head=loss), interval=3, work_dir=tmp_path)
    watched.iteration(lambda: loss(*make_batch()))
    watched.hook.after_train(watched.runner)
    assert not watched.records + watched.images + list(tmp_path.iterdir())


def test_a_gradient_that_is_not_finite_is_left_out(make_batch):
    loss = WeightedCrossEntropyLoss()
    watched = Watched(Model(decode_head=loss))
    logits, target = make_batch()
    watched.iteration(lambda: loss(logits.requires_grad_(), target).mul(float('inf')).backward())
    assert not any('gradient_share' in key for key in watched.records[0][1])


def test_one_infinite_class_leaves_no_share_to_the_others():
    balance = ClassBalance.from_sums(1, *np.array([[4.0, 9, 1], [2, 3, 1], [np.inf, 2, 3], [1, np.inf, 4]]))
    assert not np.isfinite([balance.loss_share, balance.gradient_share]).any()
    assert balance.pixel_share.sum() == pytest.approx(1)


def test_half_precision_gradients_are_added_up_in_single():
    watcher = ClassWatcher()
    watcher.with_gradient = True
    logits = torch.zeros(1, 3, 200, 200, dtype=torch.float16, requires_grad=True)
    nothing = torch.zeros(1, 3)
    watcher(logits, None, SimpleNamespace(class_count=nothing, class_correct=nothing), nothing[0])
    logits.backward(torch.full_like(logits, 300))
    np.testing.assert_allclose(watcher.sums[3], 300.0**2 * 200**2, rtol=1e-3)


@pytest.mark.slow
def test_a_picture_shows_every_class_of_every_loss_also_where_nothing_is_known(tmp_path):
    nothing = np.full(19, np.nan)
    some = np.r_[np.geomspace(0.5, 1e-4, 18), 0]
    reports = dict(
        decode=[ClassBalance(50, some, some, nothing, nothing), ClassBalance(100, some, some, some, some)],
        aux=[ClassBalance(100, nothing[:2], nothing[:2], nothing[:2], nothing[:2])],
    )
    path = tmp_path / 'new' / 'picture.png'
    picture = plot_class_balance([f'class {c}' for c in range(19)], reports, path)
    np.testing.assert_array_equal(picture, np.array(Image.open(path))[..., :3])
    one = plot_class_balance([f'class {c}' for c in range(19)], dict(decode=reports['decode']), path)
    assert one.shape[0] < picture.shape[0]


def test_an_interval_below_1_is_refused():
    with pytest.raises(ValueError, match='interval must be a whole number, at least 1, got 0'):
        ClassBalanceHook(0)
