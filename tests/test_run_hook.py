"""What the hooks of this package do in every run, and RunHook alone in a baseline."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.logging import MessageHub
from mmengine.runner import Runner
from scripted import HEAD, config, log_of, run, write_images
from torch import nn

from mmseg_imbalance.ignored_label import current_config
from mmseg_imbalance.run_hook import RunHook
from mmseg_imbalance.scores import load_image_scores

BALANCED = 'segformer/segformer_mit-b0-small-combined_1xb8-2k_camvid-240x180'
BASELINE = {'model.decode_head': HEAD | dict(loss_decode=dict(type='mmseg.CrossEntropyLoss'))}
ALONE = dict(custom_hooks=[dict(type='RunHook')])
ROAD, POLE, SKY = range(3)


def labels_with(poles):
    labels = np.full((2, 6, 8), SKY)
    labels[:, 3:] = ROAD
    labels.reshape(2, -1)[:, :poles] = POLE
    return labels


@pytest.fixture
def data(tmp_path):
    return write_images(tmp_path / 'data', labels_with(4))


def test_a_baseline_is_checked_with_the_hook_alone(data, tmp_path):
    best = {'default_hooks.checkpoint.save_best': 'IoU.pool', 'default_hooks.checkpoint.rule': 'greater'}
    runner = run(config(data, **BASELINE, **ALONE, **best), f'{tmp_path.name}-1')
    with pytest.raises(ValueError, match=r"names 'IoU\.pool', which no"):
        runner.train()
    assert runner.iter == 0
    ignored = {f'{split}_dataloader.dataset.ignore_index': SKY for split in ('train', 'val')}
    groups = {'val_evaluator.groups': dict(tail=['pole'])}
    runner = run(config(data, **BASELINE, **ALONE, **ignored, **groups), f'{tmp_path.name}-2')
    runner.train()
    assert runner.model.decode_head.ignore_index == SKY


def first_run(data, name, **options):
    """The checkpoint after one iteration."""
    options = {'default_hooks.checkpoint.interval': 1} | options
    runner = run(config(data, **options), f'{name}-first')
    runner.train()
    return str(Path(runner.work_dir, 'iter_1.pth'))


def resumed(data, name, checkpoint, evaluations=2, **options):
    cfg = config(data, evaluations, **options)
    cfg.resume, cfg.load_from = True, checkpoint
    return run(cfg, f'{name}-resumed')


def train_pixels(runner):
    return load_image_scores(Path(runner._log_dir, 'image_scores.npz'))['pixels'].tolist()


@pytest.mark.parametrize('hook', ['RunHook', 'ClassBalanceHook', None])
def test_a_resumed_run_goes_by_its_own_config(data, tmp_path, hook):
    """MMEngine puts the config of the checkpoint into the message hub."""
    hooks = dict(custom_hooks=[dict(type=hook)] if hook else [])
    checkpoint = first_run(data, tmp_path.name, **hooks)
    other = write_images(tmp_path / 'other', labels_with(9))
    change = {
        'train_dataloader.dataset.data_root': str(other),
        'val_dataloader.dataset.ignore_index': SKY,
        'default_hooks.checkpoint.save_best': 'mRecall.large',  # there is no such object
        'default_hooks.checkpoint.rule': 'greater',
    }
    runner = resumed(data, tmp_path.name, checkpoint, **hooks, **change)
    runner.train()
    (metric,) = runner.val_loop.evaluator.metrics
    log = log_of(runner)
    if hook is None:  # nothing can tell the metric: it says so
        assert log.count('a resumed run shows the config of its checkpoint') == 1
        return
    assert current_config().train_dataloader.dataset.data_root == str(other)
    assert train_pixels(runner) == [48, 18, 30]
    assert metric.ignore_index == SKY
    assert "['mRecall.large'] have no value" in log
    assert 'shows the config of its checkpoint' not in log


def test_a_resumed_run_goes_on_with_the_running_means_of_its_losses(data, tmp_path):
    options = ALONE | {'model.decode_head.loss_decode': dict(type='RecallWeightedLoss', momentum=0.3)}
    runner = resumed(data, tmp_path.name, first_run(data, tmp_path.name, **options), **options)
    runner.train()
    shares = runner.model.decode_head.loss_decode.running_shares
    assert shares.sum(1)[1].item() == pytest.approx(1 - 0.7**2, rel=1e-5)


class Count(Hook):
    """Counts the batches of each epoch and ends what does not end."""

    def __init__(self):
        self.batches = []

    def before_train_epoch(self, runner):
        self.batches.append(0)

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        self.batches[-1] += 1
        if self.batches[-1] > 5:
            raise RuntimeError('the epoch does not end')


@pytest.mark.parametrize('hook', ['RunHook', 'ResumeSamplerHook'])
def test_a_checkpoint_of_an_iteration_run_goes_on_in_epochs_that_end(data, tmp_path, hook):
    options = {
        'train_dataloader.sampler': dict(type='RareClassSampler', num_workers=0, _delete_=True),
        'custom_hooks': [dict(type=hook)],
    }
    checkpoint = first_run(data, tmp_path.name, **options)
    loop = {'train_cfg': dict(_delete_=True, type='EpochBasedTrainLoop', max_epochs=2)}
    runner = resumed(data, tmp_path.name, checkpoint, **options, **loop)
    count = Count()
    runner.register_hook(count)
    runner.train()
    assert count.batches == [2, 2]
    # and back
    options |= {'default_hooks.checkpoint.by_epoch': False}
    runner = run(config(data, 8, **options), f'{tmp_path.name}-iterations')
    runner.train()
    assert runner.train_dataloader.sampler.endless


class NaN(Hook):
    """Makes the images of some iterations NaN."""

    def __init__(self, iterations):
        self.iterations = iterations

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter + 1 in self.iterations:
            data_batch['inputs'] = [image * float('nan') for image in data_batch['inputs']]


@pytest.mark.parametrize('hooks', [['RunHook'], ['ClassBalanceHook', 'ClassWeightHook']])
def test_a_training_whose_loss_stays_nan_ends_and_says_since_when(small_config, hooks):
    cfg = small_config(BALANCED)
    cfg.custom_hooks = [dict(type=hook) for hook in hooks]
    if 'ClassWeightHook' not in hooks:
        cfg.model.decode_head.loss_decode.class_weight = None
    cfg.train_cfg.update(max_iters=20, val_interval=20)
    runner = Runner.from_cfg(cfg)
    runner.register_hook(NaN([3]))  # one batch: the weights are NaN from then on
    message = r'not been finite in 10 iterations in a row, up to iteration 12: loss, decode.*combined'
    with pytest.raises(RuntimeError, match=message):
        runner.train()


def test_a_few_losses_that_are_not_finite_end_nothing():
    hub = MessageHub.get_instance('a few')
    runner = SimpleNamespace(
        message_hub=hub,
        iter=0,
        hooks=[RunHook()],
        model=nn.Module(),
        cfg=Config(),
        train_dataloader=SimpleNamespace(dataset=SimpleNamespace()),
        train_loop=None,
        val_loop=None,
    )
    (hook,) = runner.hooks
    hook.before_train(runner)
    nan, inf = float('nan'), float('inf')

    def iterate(losses):
        for value in losses:
            hub.update_scalar('train/loss', value)
            hook.after_train_iter(runner, 0, outputs=dict(loss=torch.tensor(value)))

    iterate([1.0, *[nan] * 9, 1.0, *[inf, nan, -inf] * 3, 0.0])
    with pytest.raises(RuntimeError, match='not been finite in 10 iterations'):
        iterate([inf] * 10)
