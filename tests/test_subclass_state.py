"""The state of the subclasses in checkpoints, averaged copies, half precision and inference mode."""

import copy
import json
import pickle
import warnings
from pathlib import Path

import pytest
import torch
from mmengine.model import ExponentialMovingAverage, MomentumAnnealingEMA, StochasticWeightAverage
from mmengine.runner import Runner
from mmengine.runner.checkpoint import load_state_dict
from mmseg.models.decode_heads import SegformerHead
from test_subclass import RULES, batch, make_loss, train, without_chance
from torch import nn

from mmseg_imbalance.subclass import SubclassifiedLoss


def late_loss(**options):
    """Of a head that does not say how many classes and channels there are."""
    return SubclassifiedLoss(**options).train()


def empty(loss):
    """Whether nothing is known of the subclasses."""
    state = loss.weighting.state_dict().values()
    return not any(value.any() for value in state)


def equal(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def load_by_mmengine(loss, state):
    load_state_dict(loss, state, strict=False)


def load_by_torch(loss, state):
    loss.load_state_dict(state)


LOADERS = [load_by_mmengine, load_by_torch]
NOTHING = 'takes nothing of the subclasses in the checkpoint'


def trained(**options):
    loss = make_loss(num_subclasses=3, dtype=torch.float32, **options)
    train(loss, range(4), dtype=torch.float32)
    return loss.state_dict()


# checkpoints


@pytest.mark.parametrize('load', LOADERS)
@pytest.mark.parametrize(
    ('rule', 'changes'),
    [
        ('ema', dict(classes=7)),
        ('ema', dict(channels=9)),
        ('ema', dict(num_subclasses=4)),
        ('ema', dict(update='kmeans')),
        ('kmeans', dict(reservoir_size=64)),
        ('kmeans', dict(channels=9)),
    ],
)
def test_a_checkpoint_of_another_shape_gives_nothing_and_says_so_once(load, rule, changes):
    state = trained(update=rule)
    options = dict(classes=5, channels=4, num_subclasses=3, update=rule) | changes
    loss = make_loss(dtype=torch.float32, **options)
    with pytest.warns(UserWarning, match=rf'weighting {NOTHING}: its? .*warm-up included') as caught:
        load(loss, state)
    assert len(caught) == 1
    assert empty(loss)


@pytest.mark.parametrize('load', LOADERS)
@pytest.mark.parametrize('left', [['iteration'], ['pixels', 'loss'], ['centroid']])
def test_a_part_of_the_state_gives_nothing(load, left):
    state = {name: value for name, value in trained().items() if name.rpartition('.')[2] in left}
    loss = make_loss(num_subclasses=3)
    with pytest.warns(UserWarning, match=f'{NOTHING}: it holds .*{left[0]}.* without'):
        load(loss, state)
    assert empty(loss)


def test_numbers_that_a_cast_has_made_infinite_give_nothing():
    state = {name: value.clone() for name, value in trained().items()}
    state['weighting.pixels'].mul_(1e6)
    loss = make_loss(num_subclasses=3)
    with pytest.warns(UserWarning, match=f'{NOTHING}: its pixels is not finite'):
        loss.load_state_dict({name: value.half() for name, value in state.items()})
    assert empty(loss)


@pytest.mark.parametrize('load', LOADERS)
def test_a_checkpoint_without_subclasses_is_as_it_was(load):
    loss = make_loss(num_subclasses=3)
    if load is load_by_torch:
        with pytest.raises(RuntimeError, match=r'Missing key.*weighting\.centroid'):
            load(loss, {})
    else:
        load(loss, {})
    assert empty(loss)


@pytest.mark.parametrize('rule', RULES)
@pytest.mark.parametrize('load', [*LOADERS, lambda loss, state: loss.load_state_dict(state, assign=True)])
def test_late_subclasses_resume(rule, load):
    options = dict(num_subclasses=3, update=rule, update_freq=2, momentum=0.3, warmup_iters=2, ramp_iters=3)
    loss = late_loss(**options)
    train(loss, range(5))
    state = copy.deepcopy(loss.state_dict())
    expected = train(loss, range(5, 9))
    resumed = late_loss(**options)
    load(resumed, state)
    assert train(resumed, range(5, 9)) == expected
    assert equal(resumed, loss)


def test_late_subclasses_of_another_head_begin_anew_and_say_so_once():
    state = trained()
    loss = late_loss(num_subclasses=3)
    loss.load_state_dict(state)
    with pytest.warns(UserWarning, match=rf'{NOTHING}: .*\(5, 3, 4\), not \(5, 3, 6\)') as caught:
        train(loss, range(2), channels=6)
    assert len(caught) == 1
    assert loss.weighting.iteration == 2
    assert loss.weighting.centroid.shape == (5, 3, 6)
    loss = late_loss(num_subclasses=[2, 3, 3])
    with pytest.warns(UserWarning, match=NOTHING):
        loss.load_state_dict(state)
    assert loss.weighting.centroid is None


# averaged copies


class Model(nn.Module):
    """Buffers before and after the loss, as batch norm has them."""

    def __init__(self, loss):
        super().__init__()
        self.norm, self.loss, self.last = nn.BatchNorm1d(3), loss, nn.BatchNorm1d(2)


@pytest.mark.parametrize('rule', RULES)
@pytest.mark.parametrize('late', [False, True])
@pytest.mark.parametrize('update_buffers', [False, True])
@pytest.mark.parametrize(
    'average',
    [
        lambda model, **options: ExponentialMovingAverage(model, momentum=0.1, **options),
        lambda model, **options: StochasticWeightAverage(model, interval=2, **options),
        lambda model, **options: MomentumAnnealingEMA(model, gamma=2, **options),
    ],
)
def test_an_averaged_model_holds_the_state_as_it_is(rule, late, update_buffers, average):
    options = dict(num_subclasses=3, momentum=0.3, update=rule, update_freq=2, warmup_iters=1, ramp_iters=2)
    model = Model(late_loss(**options) if late else make_loss(dtype=torch.float32, **options))
    averaged = average(model, update_buffers=update_buffers)
    for i in range(6):
        train(model.loss, [i], dtype=torch.float32)
        model.norm.running_mean += 1
        averaged.update_parameters(model)
        assert equal(averaged.module.loss, model.loss), i
    ours, theirs = (x.loss.weighting.table() for x in (model, averaged.module))
    assert torch.equal(ours.weight.nan_to_num(0), theirs.weight.nan_to_num(0))
    assert ours.weight.nan_to_num(1).std() > 0.01
    # everything else is averaged as MMEngine does it
    assert (averaged.module.norm.running_mean == model.norm.running_mean).all() != update_buffers

    # EMAHook's swap for validation, and its resume
    for mine, its in zip(model.buffers(), averaged.module.buffers(), strict=True):
        assert mine.shape == its.shape
    resumed = Model(late_loss(**options) if late else make_loss(dtype=torch.float32, **options))
    again = average(resumed, update_buffers=update_buffers)
    again.load_state_dict(averaged.state_dict())
    resumed.load_state_dict(model.state_dict())
    for i in range(6, 9):
        for one, mean in ((model, averaged), (resumed, again)):
            train(one.loss, [i], dtype=torch.float32)
            mean.update_parameters(one)
    assert equal(again.module.loss, resumed.loss)
    assert equal(resumed.loss, model.loss)


def test_other_copies_go_their_own_way():
    loss = make_loss(num_subclasses=3)
    train(loss, range(3))
    copied, pickled = copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))
    before = copy.deepcopy(copied.state_dict())
    train(loss, range(3, 6))
    assert not equal(copied, loss)
    for one in (copied, pickled):
        for name, value in one.state_dict().items():
            assert torch.equal(value, before[name]), name
        train(one, range(3, 6))
        assert equal(one, loss)


def test_a_snapshot_and_its_state_dict_stay_as_they_are():
    loss = make_loss(num_subclasses=3)
    train(loss, range(3))
    snapshot = copy.deepcopy(loss)
    held, expected = snapshot.state_dict(), copy.deepcopy(snapshot.state_dict())
    train(loss, range(3, 6))
    assert loss.state_dict()['weighting.iteration'] == 6
    for kept in (held, snapshot.state_dict()):
        for name, value in kept.items():
            assert torch.equal(value, expected[name]), name


def test_a_snapshot_of_a_late_loss_stays_empty():
    loss = late_loss(num_subclasses=3)
    snapshot = copy.deepcopy(loss)
    train(loss, range(2))
    assert snapshot.weighting.centroid is None
    assert not snapshot.state_dict()


@pytest.mark.parametrize('copies', [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize('part', [lambda averaged: averaged, lambda averaged: averaged.module])
def test_a_snapshot_of_an_averaged_model_goes_its_own_way(copies, part):
    loss = make_loss(num_subclasses=3)
    averaged = ExponentialMovingAverage(loss)
    train(loss, range(3))
    averaged.update_parameters(loss)
    snapshot = copies(part(averaged))
    before = copy.deepcopy(snapshot.state_dict())
    train(loss, range(3, 6))
    averaged.update_parameters(loss)
    assert equal(averaged.module, loss)
    for name, value in snapshot.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_an_averaged_model_of_a_snapshot_follows_the_snapshot_alone():
    loss = make_loss(num_subclasses=3)
    snapshot = copy.deepcopy(loss)
    averaged = ExponentialMovingAverage(snapshot, update_buffers=True)
    train(loss, range(3))
    assert empty(averaged.module)
    train(snapshot, range(2))
    averaged.update_parameters(snapshot)
    assert equal(averaged.module, snapshot)


@pytest.mark.parametrize('late', [False, True])
@pytest.mark.parametrize('update_buffers', [False, True])
def test_an_averaged_model_holds_what_the_original_loads(late, update_buffers):
    model = Model(late_loss(num_subclasses=3) if late else make_loss(num_subclasses=3, dtype=torch.float32))
    averaged = ExponentialMovingAverage(model, update_buffers=update_buffers)
    train(model.loss, [0], dtype=torch.float32)
    averaged.update_parameters(model)
    model.loss.load_state_dict(trained())
    averaged.update_parameters(model)
    assert model.loss.weighting.iteration == 4
    assert equal(averaged.module.loss, model.loss)


def test_an_average_of_an_averaged_model_follows_too():
    loss = late_loss(num_subclasses=3)
    teacher = ExponentialMovingAverage(loss)  # part of the model, and EMAHook averages that
    averaged = ExponentialMovingAverage(nn.ModuleList([loss, teacher]), update_buffers=True)
    train(loss, range(3))
    for one in (teacher.module, averaged.module[0], averaged.module[1].module):
        assert equal(one, loss)


@pytest.mark.parametrize('update_buffers', [False, True])
def test_a_call_that_learns_nothing_makes_the_state_of_both(update_buffers):
    model = Model(late_loss(num_subclasses=3)).eval()
    averaged = ExponentialMovingAverage(model, update_buffers=update_buffers)
    logits, target, features = batch(0)
    model.loss(logits, target, features=features)
    for mine, its in zip(model.buffers(), averaged.module.buffers(), strict=True):
        assert mine.shape == its.shape
    averaged.update_parameters(model)
    assert empty(averaged.module.loss)


# half precision


@pytest.mark.parametrize('rule', RULES)
@pytest.mark.parametrize('late', [False, True])
@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_in_a_model_of_half_precision_the_averages_move(rule, late, dtype):
    options = dict(num_subclasses=2, update=rule, update_freq=2)
    loss = late_loss(**options) if late else make_loss(classes=2, dtype=torch.float32, **options)
    model = nn.Sequential(nn.Conv2d(4, 2, 1), loss).to(dtype)
    where = torch.arange(16).expand(1, 16, 16)
    for i in range(300):
        quarter = 4 if i > 2 else 8  # of the columns, first one half
        features = torch.where(where < quarter, 3.0, 0.0)[:, None].expand(-1, 4, -1, -1)
        features = features + 0.1 * torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(i))
        features = features.to(dtype)  # (1, 4, 16, 16)
        target = torch.zeros(1, 64, 64, dtype=torch.int64)
        value = loss(0.1 * features[:, :2], target, features=features)
        assert value.isfinite()
    share = loss.weighting.table().share[0].min().item()
    assert share == pytest.approx(0.25 + 0.25 * 0.99**297, abs=0.01)
    for name, value in model.state_dict().items():
        wide = 'weighting' in name
        assert not value.is_floating_point() or value.dtype == (torch.float32 if wide else dtype), name


def test_a_cast_of_the_buffers_themselves_does_not_last():
    loss = make_loss(num_subclasses=3, dtype=torch.float32)
    for buffer in loss.buffers():  # as FullyShardedDataParallel does it
        buffer.data = buffer.data.bfloat16() if buffer.is_floating_point() else buffer.data
    assert loss.weighting.pixels.dtype == torch.bfloat16
    train(loss, range(2), dtype=torch.float32)
    assert loss.weighting.pixels.dtype == loss.weighting.centroid.dtype == torch.float32


def test_wider_casts_are_followed():
    loss = make_loss(num_subclasses=3, dtype=torch.float32)
    assert loss.double().weighting.pixels.dtype == torch.float64
    assert loss.half().weighting.pixels.dtype == torch.float64
    assert loss.float().weighting.pixels.dtype == torch.float32
    assert loss.to('meta').weighting.pixels.device.type == 'meta'


# inference mode


@pytest.mark.parametrize('rule', RULES)
@pytest.mark.parametrize('mode', ['eval', 'train'])
def test_a_first_call_in_inference_mode_leaves_training_possible(rule, mode):
    loss, expected = (late_loss(num_subclasses=3, update=rule, update_freq=2) for _ in range(2))
    if mode == 'train':
        train(expected, [0])
    with torch.inference_mode():
        logits, target, features = batch(0)
        loss.train(mode == 'train')(logits, target, features=features)
        loss.weighting.summary()
    loss.train()
    for i in range(1, 5):
        logits, target, features = batch(i)
        logits.requires_grad_()
        value = loss(logits, target, features=features)
        value.backward()
        assert logits.grad.isfinite().all()
        assert value.item() == train(expected, [i])[0]
    assert equal(loss, expected)


def test_nothing_is_warned_of_where_the_state_fits():
    state = trained()
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        for loss in (make_loss(num_subclasses=3), late_loss(num_subclasses=3)):
            loss.load_state_dict(state)
            train(loss, range(4, 6))


# in a run


class LateHead(SegformerHead):
    """A head whose classifier has a name of its own, so that nobody knows its channels when it is built."""

    def __init__(self, **options):
        super().__init__(**options)
        self.classifier = self.conv_seg
        del self.conv_seg

    def cls_seg(self, features):
        return self.classifier(features)


CONFIG = 'segformer/segformer_mit-b0-small-subclass3_1xb8-2k_camvid-240x180'


def run(small_config, tmp_path, name, late=False, channels=None, average=None, **changes):
    """The runner, and the losses that it logged by iteration."""
    cfg = without_chance(small_config(CONFIG, **changes))
    cfg.work_dir = str(tmp_path / name)
    cfg.experiment_name = cfg.visualizer.name = f'{tmp_path.name}-{name}'
    head = cfg.model.decode_head
    head.loss_decode[1].update(update_freq=2, warmup_iters=1, ramp_iters=3, momentum=0.3)
    if late:
        head.update(type='FeatureHead', base=LateHead, init_cfg=None)
    if channels:
        head.channels = channels
    if average:
        cfg.custom_hooks.append(dict(type='EMAHook', momentum=0.1, **average))
    runner = Runner.from_cfg(cfg)
    runner.train()
    lines = Path(runner._log_dir, 'vis_data', 'scalars.json').read_text().splitlines()
    records = [record for record in map(json.loads, lines) if 'loss' in record]
    return runner, {record['iter']: record['loss'] for record in records}


def clusters(checkpoint):
    return {name: value for name, value in checkpoint.items() if '.weighting.' in name}


@pytest.mark.parametrize('late', [False, True])
@pytest.mark.parametrize('average', [dict(), dict(update_buffers=True), dict(begin_iter=4)])
def test_a_run_with_averages_resumes_with_its_subclasses(small_config, tmp_path, late, average):
    options = dict(late=late, average=average)
    first, losses = run(small_config, tmp_path, 'first', **options)
    path = str(tmp_path / 'first' / 'iter_3.pth')
    resumed, again = run(small_config, tmp_path, 'resumed', resume=True, load_from=path, **options)
    assert again == {i: losses[i] for i in (4, 5, 6)}
    expected = clusters(first.model.state_dict())
    assert len(expected) == 5
    assert expected['decode_head.loss_decode.1.weighting.iteration'] == 6
    for folder in ('first', 'resumed'):  # the averaged model is what a checkpoint hands on
        saved = torch.load(tmp_path / folder / 'iter_6.pth', weights_only=False)['state_dict']
        assert clusters(saved).keys() == expected.keys()
        for name, value in expected.items():
            assert torch.equal(saved[name], value), name
    for name, value in clusters(resumed.model.state_dict()).items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize('average', [None, dict(update_buffers=True)])
def test_fine_tuning_with_other_channels_begins_with_the_warm_up(small_config, tmp_path, average):
    run(small_config, tmp_path, 'first', average=average)
    path = str(tmp_path / 'first' / 'iter_3.pth')
    with pytest.warns(UserWarning, match=rf'^decode_head\.loss_decode\.1\.weighting {NOTHING}'):
        runner, losses = run(small_config, tmp_path, 'tuned', average=average, channels=32, load_from=path)
    assert list(losses) == [1, 2, 3, 4, 5, 6]
    assert runner.model.decode_head.loss_decode[1].weighting.iteration == 6
