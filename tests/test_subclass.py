"""The subclassified loss: clusters of features and similarity of logits."""

import copy
import io
import json
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F
from conftest import REPOSITORY
from dispatch import Largest, NoDoubles
from mmengine.logging import MessageHub
from mmengine.model import ExponentialMovingAverage
from mmengine.runner import Runner
from mmengine.structures import PixelData
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample

from mmseg_imbalance import kmeans as kmeans_module
from mmseg_imbalance.kmeans import draw_uniform, kmeans
from mmseg_imbalance.losses import Batch
from mmseg_imbalance.ops import similarity_weight, soft_stats, strips
from mmseg_imbalance.subclass import SimilaritySubclassifiedLoss, SubclassifiedLoss

DEVICE = torch.device('cuda' if torch.cuda.is_available() else 'cpu')
WEIGHT = [0.2, 3.0, 1.0, 0.5, 1.7]
RULES = ['ema', 'kmeans']


def batch(
    iteration, images=2, classes=5, channels=4, cells=(5, 7), label=(23, 31), dtype=torch.float64, seed=0
):
    """(logits, target, features): each class has several kinds of features, a class is often absent."""
    rng = np.random.default_rng([seed, iteration])
    target = np.kron(rng.integers(0, classes, (images, *cells)), np.ones((5, 5), int))[
        :, : label[0], : label[1]
    ]
    target[target == iteration % classes] = (iteration + 1) % classes
    target[rng.random(target.shape) < 0.15] = 255
    kinds = np.random.default_rng(1).normal(0, 2, (4, channels))
    features = kinds[rng.choice(4, (images, *cells), p=[0.7, 0.2, 0.07, 0.03])] + rng.normal(
        0, 0.5, (images, *cells, channels)
    )
    logits = rng.normal(0, 2, (images, classes, *cells))
    arrays = logits, features.transpose(0, 3, 1, 2)
    logits, features = (torch.tensor(x, dtype=dtype, device=DEVICE) for x in arrays)
    return logits, torch.tensor(target, device=DEVICE), features


def make_loss(classes=5, channels=4, dtype=torch.float64, **options):
    loss = SubclassifiedLoss(**options)
    loss.set_feature_shape(classes, channels)
    return loss.to(DEVICE, dtype).train()


def train(loss, iterations, **options):
    """The losses of some iterations."""
    values = []
    for i in iterations:
        logits, target, features = batch(i, **options)
        values.append(loss(logits, target, features=features).item())
    return values


def draw_cells(iteration, image, cells):
    seed = torch.Generator().manual_seed(iteration * 1_000_003 + image)
    return torch.rand(cells, generator=seed, dtype=torch.float64).tolist()


def draw_seeds(iteration, *shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(iteration), dtype=torch.float64).tolist()


@pytest.mark.parametrize('rule', RULES)
@pytest.mark.parametrize(
    ('number', 'normalize', 'max_ratio'), [([3] * 5, False, 10.0), ([1, 4, 2, 3, 3], True, None)]
)
def test_equals_the_algorithm_in_nested_loops(rule, number, normalize, max_ratio):
    options = dict(update_freq=3, reservoir_size=20, momentum=0.4, max_ratio=max_ratio, min_share=0.12)
    loss = make_loss(
        num_subclasses=number if normalize else 3,
        class_weight=WEIGHT,
        update=rule,
        warmup_iters=4,
        ramp_iters=4,
        difficulty_power=1.3,
        normalize_features=normalize,
        **options,
    )
    powers = dict(a=0.5, b=1.3, warmup=4, ramp=4, normalize=normalize)
    truth = oracle.Subclasses(number, draw_cells, draw_seeds, update=rule, **powers, **options)
    moved = 0
    for i in range(12):
        logits, target, features = batch(i)
        found = loss.eval().weigh_pixels(Batch(logits, target, features=features))
        weight, group, groups = found['pixel_weight'], found['group'], found['num_groups']
        value = loss.train()(logits, target, features=features)
        arrays = (x.cpu().numpy() for x in (features, logits, target))
        expected, chosen, expected_weight = truth.step(*arrays, WEIGHT)
        valid = chosen >= 0
        assert groups == 5 * max(number)
        group = group.cpu().numpy()
        np.testing.assert_array_equal((group % max(number))[valid], chosen[valid], err_msg=str(i))
        np.testing.assert_array_equal((group // max(number))[valid], target.cpu().numpy()[valid])
        np.testing.assert_allclose(weight.cpu().numpy()[valid], expected_weight[valid], rtol=1e-6)
        assert value.item() == pytest.approx(expected, rel=1e-6), i
        state = loss.weighting
        for c, parts in enumerate(truth.state):
            assert (state.pixels[c] > 0).nonzero().flatten().tolist() == list(parts)
            for k, part in parts.items():
                found = state.centroid[c, k].tolist(), state.pixels[c, k].item(), state.loss[c, k].item()
                assert found == (
                    pytest.approx(part['centroid']),
                    pytest.approx(part['pixels']),
                    pytest.approx(part['loss']),
                )
                moved += part['pixels'] < 0.0011 * sum(p['pixels'] for p in parts.values())
    assert (expected_weight[valid] > 1.2).any()
    assert moved > 0  # some subclass was starved and reseeded


@pytest.mark.parametrize('rule', RULES)
@pytest.mark.parametrize('weight', [None, WEIGHT])
def test_one_subclass_is_cross_entropy(rule, weight):
    loss = make_loss(
        class_weight=weight, num_subclasses=1, update=rule, update_freq=2, warmup_iters=0, ramp_iters=1
    )
    weight = None if weight is None else torch.tensor(weight, device=DEVICE).double()
    for i in range(5):
        logits, target, features = batch(i)
        ours, theirs = (logits.clone().requires_grad_() for _ in range(2))
        value = loss(ours, target, features=features)
        full = F.interpolate(theirs, target.shape[1:], mode='bilinear')
        truth = F.cross_entropy(full, target, weight, ignore_index=255)
        value.backward()
        truth.backward()
        assert value.item() == pytest.approx(truth.item(), rel=1e-6)
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=1e-12)
    assert (loss.weighting.pixels > 0).all()  # it was clustered all the same


def test_the_mean_weight_within_a_class_is_1_where_shares_are_those_of_the_state():
    loss = make_loss(num_subclasses=3, momentum=0.3, warmup_iters=0, ramp_iters=1, max_ratio=1.4)
    train(loss, range(8))
    share, _, weight, _ = loss.weighting.table()
    there = loss.weighting.pixels > 0
    mean = (share * weight).where(there, 0).sum(1)
    torch.testing.assert_close(mean, torch.ones_like(mean))
    ratio = weight.nan_to_num(0).amax(1) / weight.nan_to_num(torch.inf).amin(1)
    assert 1.39 < ratio.max() <= 1.4 + 1e-9  # clipped, and no further than asked for


def test_share_comes_first_then_difficulty():
    loss = make_loss(num_subclasses=2, warmup_iters=3, ramp_iters=4, max_ratio=None)
    train(loss, range(12))
    for iteration, power in ((3, 0.0), (4, 0.25), (6, 0.75), (7, 1.0), (99, 1.0)):
        loss.weighting.iteration.fill_(iteration)
        share, mean_loss, weight, _ = loss.weighting.table()
        raw = share**-0.5 * mean_loss**power
        torch.testing.assert_close(weight[:, 0] / weight[:, 1], raw[:, 0] / raw[:, 1])
        assert not torch.allclose(mean_loss[:, 0], mean_loss[:, 1])


def test_pixels_weigh_1_before_there_are_centroids():
    loss = make_loss(num_subclasses=3, update='kmeans', update_freq=4)
    for i in range(5):
        logits, target, features = batch(i)
        weight = loss.eval().weigh_pixels(Batch(logits, target, features=features))['pixel_weight']
        assert (weight == 1).all() == (i < 4)
        loss.train()(logits, target, features=features)


def test_a_class_that_starts_late_counts_in_pixels_and_with_its_own_losses():
    """Labels are 8 times the features: a start from cells must not vanish under the next batch's pixels."""
    for rule in RULES:
        loss = make_loss(classes=2, num_subclasses=2, update=rule, update_freq=3)
        rare = torch.zeros(2, 8, 8, dtype=torch.bool, device=DEVICE)
        rare[:, :2] = True  # a quarter
        for i in range(7):
            features = torch.where(rare[:, None], 5.0, 0.0).expand(-1, 4, -1, -1).double()
            features = features + 0.1 * torch.randn(
                features.shape, generator=torch.Generator().manual_seed(i)
            )
            target = torch.full(
                (2, 64, 64), int(i == 4 or i == 6), device=DEVICE
            )  # class 1 twice, not in i = 2
            if i == 6:
                target[:, 16:] = 0  # of class 1 its rare part alone
            logits = torch.stack([rare * 0.5, rare * -1.0], 1).double()
            loss(logits, target, features=features.to(DEVICE))
            if i == 4:
                before = loss.weighting.table().share[1].max().item()
                mean_loss = loss.weighting.table().mean_loss[1]
                assert before == pytest.approx(0.75, abs=0.05)  # of a sample, with 'kmeans'
                assert (mean_loss > 0.5).all()
        # the batch in between had 8192 pixels of the class, this one 2048, all of the other part
        expected = 0.99 * 8192 * before / (0.99 * 8192 + 0.01 * 2048)
        assert loss.weighting.table().share[1].max().item() == pytest.approx(expected, abs=1e-3)


def test_subclasses_that_the_config_has_no_more_end():
    loss = make_loss(num_subclasses=3)
    train(loss, range(3))
    fewer = make_loss(num_subclasses=[1, 2, 3, 3, 3])
    fewer.load_state_dict(loss.state_dict())
    train(fewer, range(3, 9))
    assert (fewer.weighting.pixels > 0).sum(1).tolist()[:2] == [1, 2]
    assert fewer.weighting.table().weight[0, 0] == 1


def test_pixel_weights_of_the_head_count_too():
    loss = make_loss(num_subclasses=2)
    train(loss, range(3))
    logits, target, features = batch(3)
    keep = torch.rand(target.shape, device=DEVICE) < 0.5
    state = copy.deepcopy(loss.state_dict())
    weighted = loss(logits, target, weight=keep.double(), features=features)
    counts = loss.weighting.pixels.clone()
    loss.load_state_dict(state)
    plain = loss.eval()(logits, target.where(keep, 255), features=features)
    assert weighted.item() == pytest.approx(plain.item(), rel=1e-9)
    loss.train()(logits, target, features=features)
    torch.testing.assert_close(loss.weighting.pixels, counts)  # never weighted


@pytest.mark.parametrize('rule', RULES)
def test_a_restored_state_goes_on_with_identical_losses(rule):
    def make():
        return make_loss(
            num_subclasses=3, update=rule, update_freq=4, momentum=0.3, warmup_iters=2, ramp_iters=5
        )

    loss = make()
    train(loss, range(7))
    file = io.BytesIO()
    torch.save(loss.state_dict(), file)
    expected = train(loss, range(7, 16))
    restored = make()
    file.seek(0)
    restored.load_state_dict(torch.load(file, weights_only=True))
    assert train(restored, range(7, 16)) == expected
    assert train(make(), range(7, 16)) != expected


def test_nothing_is_learnt_outside_training():
    loss = make_loss(num_subclasses=3)
    train(loss, range(3))
    state = copy.deepcopy(loss.state_dict())
    train(loss.eval(), range(3, 6))
    for name, value in loss.state_dict().items():
        assert torch.equal(value, state[name]), name


@pytest.mark.parametrize('rule', RULES)
@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_features_that_are_not_finite_are_an_error_and_leave_the_state(rule, value):
    loss = make_loss(num_subclasses=3, update=rule, update_freq=2)
    train(loss, range(4))
    state = copy.deepcopy(loss.state_dict())
    logits, target, features = batch(4)
    features[1, 2, 3, 4] = value
    with pytest.raises(RuntimeError, match=r'training iteration 5 the features .* not finite'):
        loss(logits, target, features=features)
    logits, target, features = batch(4)
    logits[0, 0, 0, 0] = value
    with pytest.raises(RuntimeError, match='training iteration 5'):
        loss(logits, target, features=features)
    for name, kept in loss.state_dict().items():
        assert torch.equal(kept, state[name]), name
    train(loss, [4])


@pytest.mark.parametrize('rule', RULES)
def test_features_not_finite_at_the_very_start(rule):
    loss = make_loss(num_subclasses=3, update=rule)
    logits, target, features = batch(0)
    with pytest.raises(RuntimeError, match='training iteration 1 '):
        loss(logits, target, features=torch.full_like(features, float('nan')))
    assert loss.weighting.iteration == 0


@pytest.mark.parametrize('rule', RULES)
def test_a_class_that_never_occurs_and_one_of_a_single_cell(rule):
    loss = make_loss(classes=7, num_subclasses=3, update=rule, update_freq=2, momentum=0.5)
    generator = torch.Generator().manual_seed(0)
    for i in range(12):
        logits, target, features = batch(i)
        target[target < 255] = target[target < 255] % 3
        target[:, 0, 0] = 5
        logits = torch.randn(2, 7, *logits.shape[2:], generator=generator, dtype=torch.float64).to(DEVICE)
        # the same feature wherever class 5 is: one cell, however often it is seen
        features[:, :, 0, 0] = torch.tensor([1.0, 2.0, 3.0, 4.0])
        value = loss(logits, target, features=features)
        assert value.isfinite()
    state = loss.weighting
    assert not state.pixels[[3, 4, 6]].any()
    torch.testing.assert_close(state.centroid[5, 0].cpu(), torch.tensor([1.0, 2.0, 3.0, 4.0]).double())
    weight = state.table().weight
    assert weight[5, 0] == pytest.approx(1, abs=0.01)  # hardly moved by subclasses that attract nothing
    assert all(x.isfinite() for x in loss.logged.values())


@pytest.mark.parametrize('rule', RULES)
def test_constant_features(rule):
    loss = make_loss(num_subclasses=3, update=rule, update_freq=2, momentum=0.5, warmup_iters=0, ramp_iters=1)
    plain = make_loss(num_subclasses=1)
    for i in range(12):
        logits, target, features = batch(i)
        features = torch.full_like(features, 1 / 3)
        value = loss(logits, target, features=features).item()
        assert value == pytest.approx(plain(logits, target, features=features).item(), rel=1e-3)
    torch.testing.assert_close(
        loss.weighting.centroid[:, 0], torch.full_like(loss.weighting.centroid[:, 0], 1 / 3)
    )


def test_a_subclass_that_dies_moves_to_the_hardest_cell():
    loss = make_loss(num_subclasses=2, momentum=0.2)
    train(loss, range(2))
    state = loss.weighting
    state.centroid[:, 1] = 1000.0  # where nothing is near
    for i in range(2, 60):
        logits, target, features = batch(i)
        loss(logits, target, features=features)
        moved = (state.centroid[:, 1] != 1000).any(1) & (state.starved[:, 1] == 0)
        if moved.any():
            break
    c = moved.nonzero()[0, 0].item()
    hardest = max(
        (-logits[b, :, i, j].log_softmax(0)[c].item(), b, i, j)
        for b, i, j in np.ndindex(2, 5, 7)
        if (
            target[b][[r for r in range(23) if r * 5 // 23 == i]][
                :, [s for s in range(31) if s * 7 // 31 == j]
            ]
            == c
        ).any()
    )
    _, b, i, j = hardest
    torch.testing.assert_close(state.centroid[c, 1], features[b, :, i, j])
    assert state.table().share[c, 1] == pytest.approx(1e-3, rel=1e-2)
    train(loss, range(i + 1, i + 30))
    assert state.table().share[c, 1] > 0.02


@pytest.mark.slow
@pytest.mark.parametrize('rule', RULES)
def test_it_finds_the_parts_of_a_mixture(rule):
    """Three Gaussians in each class, of shares 0.8, 0.15, 0.05 and losses 0.1, 0.7, 2."""
    true_share, true_loss = np.array([0.8, 0.15, 0.05]), np.array([0.1, 0.7, 2.0])
    for seed in range(10):
        rng = np.random.default_rng(seed)
        loss = make_loss(
            classes=3, channels=16, dtype=torch.float32, num_subclasses=3, update=rule, update_freq=10,
            momentum=0.1, warmup_iters=10, ramp_iters=10, max_ratio=None,
        )  # fmt: skip
        middle = rng.normal(0, 1, (3, 3, 16))
        for _ in range(40):
            target = rng.integers(0, 3, (2, 16, 32))
            part = rng.choice(3, target.shape, p=true_share)
            features = middle[target, part] + rng.normal(0, 0.25, (*target.shape, 16))
            p = np.exp(-true_loss[part] * rng.uniform(0.5, 1.5, part.shape))
            logits = np.log((1 - p) / 2)[..., None].repeat(3, -1)
            np.put_along_axis(logits, target[..., None], np.log(p)[..., None], -1)
            logits, features = (
                torch.tensor(x.transpose(0, 3, 1, 2), dtype=torch.float32, device=DEVICE)
                for x in (logits, features)
            )
            loss(logits, torch.tensor(target, device=DEVICE), features=features)
        share, mean_loss, weight, _ = loss.weighting.table().numpy()
        for c in range(3):
            order = np.argsort(-share[c])
            np.testing.assert_allclose(share[c][order], true_share, atol=0.03, err_msg=f'{seed} {c}')
            np.testing.assert_allclose(mean_loss[c][order], true_loss, rtol=0.15, err_msg=f'{seed} {c}')
            assert (np.diff(weight[c][order]) > 0).all()
            away = np.linalg.norm(loss.weighting.centroid[c].cpu().numpy()[order] - middle[c], axis=1)
            assert (away < 0.6).all()  # of about 5 between them


def test_kmeans_agrees_with_scikit_learn():
    from sklearn.cluster import KMeans

    rng = np.random.default_rng(0)
    points = rng.normal(0, 1, (2, 60, 3)) + 4 * rng.integers(0, 3, (2, 60, 1))
    valid = torch.ones(2, 60, dtype=torch.bool)
    valid[1, 45:] = False
    exists = torch.ones(2, 3, dtype=torch.bool)
    centroid, counts = kmeans(torch.tensor(points), valid, exists, torch.Generator().manual_seed(0))
    for c, number in enumerate((60, 45)):
        truth = KMeans(3, n_init=20, random_state=0).fit(points[c, :number])
        order, expected_order = centroid[c, :, 0].argsort(), np.argsort(truth.cluster_centers_[:, 0])
        np.testing.assert_allclose(centroid[c][order], truth.cluster_centers_[expected_order], atol=1e-6)
        assert counts[c][order].tolist() == np.bincount(truth.labels_)[expected_order].tolist()


def test_memory_is_that_of_the_features_and_the_label(monkeypatch):
    channels, classes, cells, label = 64, 5, (16, 32), (128, 256)
    loss = make_loss(classes, channels, torch.float32, num_subclasses=3)
    logits, target, features = batch(
        0, classes=classes, channels=channels, cells=cells, label=label, dtype=torch.float32
    )
    target = F.interpolate(target[:, None].float(), label)[:, 0].long()
    loss(logits, target, features=features)
    monkeypatch.setattr(strips, 'STRIP_NUMBERS', 4 * classes * label[1])
    with Largest() as record:
        loss(logits, target, features=features)
    assert record.numel <= target.numel() < 64 * target.numel()  # of resized features


def test_under_autocast_the_state_is_that_of_full_precision():
    plain, mixed = (make_loss(num_subclasses=3, dtype=torch.float32) for _ in range(2))
    for i in range(6):
        logits, target, features = batch(i, dtype=torch.float32)
        logits, features = (x.bfloat16() for x in (logits, features))
        expected = plain(logits.float(), target, features=features.float())
        with torch.autocast(DEVICE.type, torch.bfloat16):
            value = mixed(logits, target, features=features)
        assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, kept in mixed.state_dict().items():
        assert kept.dtype in (torch.float32, torch.int64)
        torch.testing.assert_close(kept, plain.state_dict()[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ('options', 'match'),
    [
        (dict(num_subclasses=0), 'num_subclasses must be an int from 1 to 255'),
        (dict(num_subclasses=2.5), 'got 2.5'),
        (dict(num_subclasses=[]), r'got \[\]'),
        (dict(num_subclasses=dict(car=300)), "got {'car': 300}"),
        (dict(update='mean'), "update must be one of .* got 'mean'"),
        (dict(momentum=0), r'momentum must lie in \(0, 1\], got 0'),
        (dict(update_freq=0), 'update_freq must be at least 1, got 0'),
        (dict(reservoir_size=2), 'reservoir_size must be at least K = 3, got 2'),
        (dict(frequency_power=-1), 'frequency_power must be finite and >= 0, got -1'),
        (dict(difficulty_power=float('nan')), 'difficulty_power must be finite'),
        (dict(warmup_iters=-1), 'warmup_iters must be at least 0'),
        (dict(ramp_iters=-1), 'ramp_iters must be at least 0'),
        (dict(max_ratio=0.5), 'max_ratio must be None or at least 1, got 0.5'),
        (dict(min_share=0.4), r'min_share must lie in \[0, 1 / K\) with K = 3, got 0.4'),
        (dict(loss_name='subclass'), "must contain 'loss'"),
    ],
)
def test_bad_arguments_are_named(options, match):
    with pytest.raises(ValueError, match=match):
        SubclassifiedLoss(**options)


def test_bad_arguments_of_similarity_are_named():
    with pytest.raises(ValueError, match=r'takes no label_smoothing, got 0\.1'):
        SimilaritySubclassifiedLoss(paper_exact=True, label_smoothing=0.1)
    with pytest.raises(ValueError, match='threshold must be finite and above 0, got 0'):
        SimilaritySubclassifiedLoss(threshold=0)


def test_unknown_arguments_are_refused():
    with pytest.raises(TypeError, match='num_clusters'):
        SubclassifiedLoss(num_clusters=3)


def test_numbers_by_class_name(tmp_path):
    hub = MessageHub.get_instance(f'subclass-{tmp_path.name}')  # the one that was made last is current
    loss = make_loss(num_subclasses=dict(b=4, e=2))
    logits, target, features = batch(0)
    with pytest.raises(RuntimeError, match='num_subclasses by name needs the class names'):
        loss(logits, target, features=features)
    hub.update_info('dataset_meta', dict(classes=tuple('abcdf')))
    with pytest.raises(ValueError, match=r"num_subclasses names \['e'\], which the data set does not have"):
        loss(logits, target, features=features)
    hub.update_info('dataset_meta', dict(classes=tuple('abcde')))
    train(loss, range(4))
    assert (loss.weighting.pixels > 0).sum(1).tolist() == [1, 4, 1, 1, 2]


def test_a_list_of_another_length_is_named():
    loss = SubclassifiedLoss(num_subclasses=[1, 2, 3])
    with pytest.raises(ValueError, match=r'num_subclasses holds 3 numbers, .* predicts 5 classes'):
        loss.set_feature_shape(5, 4)


def test_features_of_another_shape_are_named():
    loss = make_loss(num_subclasses=3)
    logits, target, features = batch(0)
    with pytest.raises(
        ValueError, match=r"features must be of shape \(2, 4, 'h', 'w'\).* got \(2, 3, 5, 7\)"
    ):
        loss(logits, target, features=features[:, :3])
    with pytest.raises(ValueError, match='target holds'):
        loss(logits, target.where(target != 3, 9), features=features)


# in the framework's heads


def head_config(type='FeatureASPPHead', loss=None, **options):
    subclassified = dict(type='SubclassifiedLoss', num_subclasses=3, loss_weight=0.2)
    losses = [dict(type='CombinedWeightedLoss', class_weight=WEIGHT, loss_weight=0.8), subclassified]
    return dict(
        type=type, in_channels=8, channels=16, num_classes=5, dropout_ratio=0.1, norm_cfg=dict(type='BN'),
        loss_decode=losses if loss is None else loss, **options,
    )  # fmt: skip


def head_batch():
    generator = torch.Generator().manual_seed(1)
    maps = [torch.randn(2, 8, 6, 8, generator=generator) for _ in range(4)]
    label = torch.randint(0, 5, (2, 1, 46, 61), generator=generator)
    return maps, [
        SegDataSample(gt_sem_seg=PixelData(data=y), metainfo=dict(img_shape=(46, 61))) for y in label
    ]


@pytest.mark.parametrize(
    ('type', 'options'),
    [
        ('FeatureASPPHead', dict(dilations=(1, 2))),
        ('FeatureHead', dict(base='FCNHead', num_convs=1)),
        ('FeatureHead', dict(base='OCRHead', ocr_channels=4)),
        ('FeatureSegformerHead', dict()),
    ],
)
def test_heads_say_how_many_classes_and_channels_there_are(type, options):
    cfg = head_config(type, **options)
    if type == 'FeatureSegformerHead':
        cfg.update(in_channels=[8] * 4, in_index=[0, 1, 2, 3])
    head = MODELS.build(cfg)
    loss = head.loss_decode[1]
    assert loss.weighting.centroid.shape == (5, 3, 16)
    maps, samples = head_batch()
    previous = [torch.sin(maps[2][:, :5])] if 'OCRHead' in options.values() else []
    for _ in range(2):
        losses = head.loss(maps, *previous, samples, None)
    assert loss.weighting.iteration == 2
    assert {'loss_combined', 'loss_subclass', 'subclass_smallest_share', 'subclass_weight_ratio'} <= set(
        losses
    )
    assert 0 < losses['subclass_smallest_share'] < 1 < losses['subclass_weight_ratio']
    assert head.features is None


def test_a_head_of_one_channel_has_two_classes():
    cfg = head_config(
        'FeatureHead',
        dict(type='SubclassifiedLoss'),
        base='FCNHead',
        num_convs=1,
        out_channels=1,
        threshold=0.3,
    )
    cfg['num_classes'] = 2
    head = MODELS.build(cfg)
    maps, samples = head_batch()
    for sample in samples:
        sample.gt_sem_seg.data %= 2
    assert head.loss(maps, samples, None)['loss_subclass'].isfinite()
    assert head.loss_decode.weighting.centroid.shape == (2, 3, 16)


def test_a_head_without_features_is_told_which_have_them():
    head = MODELS.build(head_config('ASPPHead', dilations=(1, 2)))
    with pytest.raises(
        RuntimeError,
        match=r"FeatureASPPHead, .* base='UPerHead'.* SimilaritySubclassifiedLoss needs",
    ):
        head.loss(*head_batch(), None)


def test_a_head_that_never_calls_cls_seg_is_refused_with_the_same_names():
    cfg = head_config('FeatureHead', base='SegmenterMaskTransformerHead', num_layers=1, num_heads=2)
    cfg.update(embed_dims=16, in_index=2, norm_cfg=dict(type='LN'))
    head = MODELS.build(cfg)
    with pytest.raises(RuntimeError, match=r"no cls_seg was called .*base='UPerHead'"):
        head.loss(*head_batch(), None)


def test_similarity_works_with_a_plain_head_as_with_ours():
    loss = dict(type='SimilaritySubclassifiedLoss', class_weight=WEIGHT)
    values = []
    for type in ('ASPPHead', 'FeatureASPPHead'):
        torch.manual_seed(0)
        head = MODELS.build(head_config(type, loss, dilations=(1, 2), align_corners=True))
        torch.manual_seed(0)
        values.append(head.loss(*head_batch(), None)['loss_subclass'].item())
    assert values[0] == pytest.approx(values[1], rel=1e-5)


# SimilaritySubclassifiedLoss


def similarity_batch(size, images=1, cells=None, dtype=torch.float64):
    rng = np.random.default_rng(0)
    target = np.kron(rng.integers(0, 4, (images, size[0] // 6 + 1, size[1] // 6 + 1)), np.ones((6, 6), int))
    target = target[:, : size[0], : size[1]]
    # few kinds of logits, so that about half of a class is similar
    kinds = 3 * rng.normal(0, 1, (5, 4))
    logits = kinds[rng.integers(0, 5, (images, *(cells or size)))] + rng.normal(
        0, 0.1, (images, *(cells or size), 4)
    )
    target[rng.random(target.shape) < 0.1] = 255
    return torch.tensor(logits.transpose(0, 3, 1, 2), dtype=dtype, device=DEVICE), torch.tensor(
        target, device=DEVICE
    )


@pytest.mark.parametrize('exact', [False, True])
@pytest.mark.parametrize('size', [(32, 48), (37, 53), (5, 7), (1, 40)])
@pytest.mark.parametrize('threshold', [0.98, 0.5, 2.0])
def test_similarity_equals_nested_loops(size, exact, threshold):
    logits, target = similarity_batch(size, images=2)
    weight = similarity_weight(logits, target, threshold=threshold, paper_exact=exact)
    truth = oracle.similarity_weight(logits.cpu().numpy(), target.cpu().numpy(), threshold, exact=exact)
    if exact:
        truth = np.broadcast_to(truth.mean(0), truth.shape)
    np.testing.assert_allclose(weight.cpu().numpy(), truth, rtol=1e-9)
    if threshold == 2 and not exact:
        assert (weight - 1).abs().max() < 1e-12
    elif min(size) > 30 and threshold < 1:
        assert weight.std() > 0.002


@pytest.mark.parametrize('align_corners', [False, True])
def test_similarity_of_small_logits_is_that_of_resized_ones(align_corners):
    logits, target = similarity_batch((61, 90), cells=(9, 13))
    full = F.interpolate(logits, (61, 90), mode='bilinear', align_corners=align_corners)
    small = similarity_weight(logits, target, align_corners=align_corners, threshold=0.9)
    torch.testing.assert_close(small, similarity_weight(full, target, threshold=0.9), rtol=1e-9, atol=0)
    assert small.std() > 0.02


def test_ignored_pixels_change_no_weight():
    logits, target = similarity_batch((64, 64))
    target[:, :, 32:] = 255
    cut = similarity_weight(logits[:, :, :, :32], target[:, :, :32])
    weight = similarity_weight(logits, target)
    torch.testing.assert_close(weight[:, :, :32], cut)
    exact = similarity_weight(logits, target, paper_exact=True)
    assert not torch.allclose(exact[:, :, :32], cut)
    target[0, :30] = 255
    assert (similarity_weight(logits, target) == similarity_weight(-logits, target)).all()
    target[:] = 255
    assert (similarity_weight(logits, target) == 1).all()


@pytest.mark.parametrize('exact', [False, True])
def test_above_1_similarity_is_cross_entropy(exact):
    logits, target = similarity_batch((37, 53), images=2)
    loss = SimilaritySubclassifiedLoss(WEIGHT[:4], threshold=1.01, paper_exact=exact)
    weight = torch.tensor(WEIGHT[:4], dtype=torch.float64, device=DEVICE)
    truth = F.cross_entropy(logits, target, weight, ignore_index=255, reduction='none')
    counted = target.numel() if exact else weight[target[target != 255]].sum()
    assert loss(logits, target).item() == pytest.approx((truth.sum() / counted).item(), rel=1e-6)


def test_similarity_equals_the_papers_code():
    path = REPOSITORY.parent / 'shared' / 'golden_similarity.npz'
    if not path.exists():
        pytest.skip(f'needs {path.name}, values of the public code, beside the repository')
    golden = np.load(path)
    assert golden['class_weight'].size == 0
    logits = torch.tensor(golden['logits'], device=DEVICE, requires_grad=True)
    target = torch.tensor(golden['label'], device=DEVICE).long()
    for image, expected in enumerate(golden['weight']):
        one = slice(image, image + 1)
        weight = similarity_weight(logits[one], target[one], paper_exact=True)
        np.testing.assert_allclose(weight[0].cpu().numpy(), expected, atol=1e-5)
    value = SimilaritySubclassifiedLoss(paper_exact=True)(logits, target)
    value.backward()
    assert value.item() == pytest.approx(golden['loss'].item(), rel=1e-5)
    scale = np.abs(golden['grad']).max()
    np.testing.assert_allclose(logits.grad.cpu().numpy() / scale, golden['grad'] / scale, atol=1e-5)


@pytest.mark.slow
def test_no_weight_exceeds_10():
    """All but one pixel in a few hundred resemble thousands of others."""
    target = torch.zeros(1, 800, 800, dtype=torch.int64, device=DEVICE)
    target[:, :64, :64] = 1
    logits = torch.ones(1, 2, 800, 800, device=DEVICE)
    weight = similarity_weight(logits, target)
    assert weight[0, -1, -1] < 1.01
    logits[:, 1, 356:364, 356:364] = -3
    weight = similarity_weight(logits, target)
    assert weight.max() == 10


def test_tiles_do_not_change_the_counts(monkeypatch):
    from mmseg_imbalance.ops import similarity

    logits, target = similarity_batch((64, 96))
    whole = similarity_weight(logits, target)
    monkeypatch.setattr(similarity, 'TILE_NUMBERS', 1000)
    assert torch.equal(similarity_weight(logits, target), whole)
    with Largest() as record:
        similarity_weight(logits, target)
    assert record.numel <= target.numel() * 4  # the logits at every fourth pixel and the map, no matrix


# in a run


def without_chance(cfg):
    """A config in which nothing is random, so that a resumed run sees what the first one saw."""
    scale = dict(type='Resize', scale=(64, 64), keep_ratio=False)
    load = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations')]
    cfg.train_dataloader.dataset.pipeline = [*load, scale, dict(type='PackSegInputs')]
    cfg.train_dataloader.sampler = dict(type='InfiniteSampler', shuffle=False)
    cfg.train_cfg.update(max_iters=6, val_interval=6)
    cfg.default_hooks.checkpoint.update(interval=3, max_keep_ckpts=-1)
    cfg.param_scheduler = [dict(type='ConstantLR', factor=1.0)]
    cfg.custom_hooks = [dict(type='ClassWeightHook')]
    return cfg


@pytest.mark.parametrize('rule', RULES)
def test_a_resumed_run_continues_with_identical_losses(small_config, tmp_path, rule):
    options = dict(update=rule, update_freq=2, warmup_iters=1, ramp_iters=3, momentum=0.3)

    def run(name, **changes):
        cfg = small_config('segformer/segformer_mit-b0-small-subclass3_1xb8-2k_camvid-240x180', **changes)
        cfg.model.decode_head.loss_decode[1].update(options)
        cfg.experiment_name = cfg.visualizer.name = f'{tmp_path.name}-{name}'
        cfg.work_dir = str(tmp_path / name)  # logs of the same second are of one folder
        runner = Runner.from_cfg(without_chance(cfg))
        runner.train()
        lines = Path(runner._log_dir, 'vis_data', 'scalars.json').read_text().splitlines()
        keys = (
            'loss',
            'decode.loss_subclass',
            'decode.subclass_smallest_share',
            'decode.subclass_weight_ratio',
        )
        records = [record for record in map(json.loads, lines) if 'loss' in record]
        return {record['iter']: [record[key] for key in keys] for record in records}, runner.model

    first, model = run('first')
    resumed, other = run('resumed', resume=True, load_from=str(tmp_path / 'first' / 'iter_3.pth'))
    assert list(resumed) == [4, 5, 6]
    assert resumed == {i: first[i] for i in (4, 5, 6)}
    assert first[6][3] > 1.01  # subclasses weigh differently
    for (name, value), again in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(value, again), name


def test_an_averaged_model_keeps_the_state():
    loss = make_loss(num_subclasses=3, momentum=0.3)
    average = ExponentialMovingAverage(loss)
    train(loss, range(4))
    average.update_parameters(loss)
    for name, value in loss.state_dict().items():
        assert torch.equal(average.module.state_dict()[name], value), name


# nothing to learn from


def emptied(target, kind):
    """Labels without a pixel that counts, in all images or in the first, or of a class of weight 0 alone."""
    if kind == 'weight 0':
        return target.where(target == 255, 0)
    target = target.clone()
    target[: len(target) if kind == 'void' else 1] = 255
    return target


NO_PIXELS = ['void', 'first void', 'weight 0']
AUTOCAST = [None, torch.bfloat16, torch.float16]  # of the logits


def value_and_gradient(loss, logits, target, autocast, **options):
    logits = logits.clone().requires_grad_()
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast is not None):
        value = loss(logits.to(autocast or logits.dtype), target, **options)
    value.backward()
    return value.detach(), logits.grad


@pytest.mark.parametrize('rule', RULES)
@pytest.mark.parametrize('kind', NO_PIXELS)
@pytest.mark.parametrize('autocast', AUTOCAST)
@pytest.mark.parametrize('before', [0, 3])
def test_batches_without_a_pixel_that_counts_are_finite(rule, kind, autocast, before):
    loss = make_loss(
        num_subclasses=3, update=rule, update_freq=100 if kind == 'void' else 2, class_weight=[0, 1, 1, 2, 1],
        warmup_iters=0, ramp_iters=1, momentum=0.3, dtype=torch.float32,
    )  # fmt: skip
    train(loss, range(before), dtype=torch.float32)
    state = copy.deepcopy(loss.state_dict())
    for i in range(before, before + 3):
        logits, target, features = batch(i, dtype=torch.float32)
        target = emptied(target, kind)
        value, gradient = value_and_gradient(loss, logits, target, autocast, features=features)
        assert value.isfinite()
        assert gradient.isfinite().all()
        assert (value == 0) == (kind != 'first void')
        assert all(x.isfinite() for x in loss.logged.values())
    for name, kept in loss.state_dict().items():
        assert kept.isfinite().all()
        if kind == 'void' and 'iteration' not in name:
            assert torch.equal(kept, state[name]), name


@pytest.mark.parametrize('options', [dict(), dict(label_smoothing=0.1), dict(paper_exact=True)])
@pytest.mark.parametrize('kind', NO_PIXELS)
@pytest.mark.parametrize('autocast', AUTOCAST)
def test_similarity_without_a_pixel_that_counts_is_finite(options, kind, autocast):
    loss = SimilaritySubclassifiedLoss([0, 1, 1, 2, 1], **options)
    logits, target, _ = batch(1, dtype=torch.float32)
    value, gradient = value_and_gradient(loss, logits, emptied(target, kind), autocast)
    assert value.isfinite()
    assert gradient.isfinite().all()


# where there is no double


@pytest.mark.parametrize('rule', RULES)
@pytest.mark.parametrize('normalize', [False, True])
def test_the_clustering_needs_no_float64(rule, normalize):
    loss = make_loss(
        num_subclasses=3, update=rule, update_freq=3, reservoir_size=20, momentum=0.6, min_share=0.3,
        warmup_iters=2, ramp_iters=4, normalize_features=normalize, dtype=torch.float32,
    )  # fmt: skip
    moved = 0
    for i in range(8):
        logits, target, features = batch(i, dtype=torch.float32)
        with NoDoubles():
            found = loss.weigh_pixels(Batch(logits, target, features=features))
        stats = soft_stats(logits, target, **found)  # what it does is pinned where it is
        with NoDoubles():
            loss.learn(stats)
            state = loss.weighting.table()
        moved += (state.share < 0.0011).sum()
    assert moved > 0
    assert (loss.weighting.pixels > 0).all()


def test_draws_are_those_of_torch():
    made = (torch.Generator().manual_seed(3) for _ in range(2))
    expected = torch.rand(4, 50, generator=next(made), dtype=torch.float64)
    np.testing.assert_array_equal(draw_uniform((4, 50), next(made)), expected)


def test_no_draw_falls_on_a_point_without_a_chance(monkeypatch):
    """Numbers just below 1 round to 1 in float32."""
    monkeypatch.setattr(kmeans_module, 'draw_uniform', lambda shape, generator: np.full(shape, 1 - 2**-53))
    points = torch.arange(6.0)[None, :, None]
    valid = torch.tensor([[True, True, True, False, False, False]])
    centroid, counts = kmeans(points, valid, torch.ones(1, 3, dtype=torch.bool), torch.Generator())
    assert sorted(centroid.flatten().tolist()) == [0, 1, 2]
    assert counts.tolist() == [[1, 1, 1]]
