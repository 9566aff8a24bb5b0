"""The parts of a loss in the log of a run, with MMSegmentation's heads and with ours."""

import json
from pathlib import Path

import numpy as np
import pytest
from mmengine.runner import Runner
from mmseg.models.decode_heads import SegformerHead
from mmseg.models.utils import resize
from ranks import on_ranks, trained_on_rank
from scripted import config, write_images

BALANCED = 'segformer/segformer_mit-b0-small-combined_1xb8-2k_camvid-240x180'
PARTS = {'decode.combined_ce', 'decode.combined_dice'}


def logged(cfg):
    """The lines of training in the log, by iteration."""
    runner = Runner.from_cfg(cfg)
    runner.train()
    lines = Path(runner._log_dir, 'vis_data', 'scalars.json').read_text().splitlines()
    records = map(json.loads, lines)
    return {record['iter']: record for record in records if 'loss' in record}


@pytest.mark.parametrize(
    'hooks',
    [['ClassWeightHook'], ['ClassBalanceHook'], ['ClassWeightHook', 'ClassBalanceHook'], ['RunHook'], []],
)
def test_mmsegmentations_head_logs_the_parts_through_a_hook(small_config, hooks):
    cfg = small_config(BALANCED)
    cfg.model.decode_head.type = 'SegformerHead'
    cfg.model.decode_head.loss_decode.class_weight = None
    cfg.custom_hooks = [dict(type=hook) for hook in hooks]
    cfg.train_cfg.update(max_iters=5, val_interval=5)
    cfg.default_hooks.logger.interval = 2
    records = logged(cfg)
    assert list(records) == [2, 4]
    for record in records.values():
        assert PARTS & record.keys() == (PARTS if hooks else set())
        if hooks:
            total = 0.6 * record['decode.combined_ce'] + 0.4 * record['decode.combined_dice']
            record['expected'] = total
    if hooks:  # the loss is a mean over the iterations between two lines, the parts are of the last
        assert records[2]['expected'] != records[4]['expected']


def test_the_numbers_are_those_of_a_feature_head(small_config, tmp_path):
    found = []
    for type in ('SegformerHead', 'FeatureSegformerHead'):
        cfg = small_config(BALANCED)
        cfg.model.decode_head.type = type
        cfg.experiment_name = cfg.visualizer.name = f'{tmp_path.name}-{type}'
        found.append(logged(cfg))
    for mine, theirs in zip(*(records.values() for records in found), strict=True):
        for key in ('loss', *PARTS):
            assert mine[key] == pytest.approx(theirs[key], rel=1e-5)


def test_an_epoch_shorter_than_the_interval_of_the_log_has_the_parts_at_its_end(tmp_path):
    data = write_images(tmp_path / 'data', np.arange(96).reshape(2, 6, 8) % 3)
    options = {
        'custom_hooks': [dict(type='RunHook')],
        'default_hooks.logger.interval': 10,
        'model.decode_head.loss_decode.type': 'CombinedWeightedLoss',
        'train_cfg': dict(_delete_=True, type='EpochBasedTrainLoop', max_epochs=1),
        'train_dataloader.sampler.type': 'DefaultSampler',
    }
    cfg = config(data, **options)
    cfg.experiment_name = cfg.visualizer.name = tmp_path.name
    (record,) = logged(cfg).values()
    assert record.keys() >= PARTS


class OwnLossHead(SegformerHead):
    """Computes its losses itself, as PointHead and DDRHead do."""

    def loss_by_feat(self, seg_logits, batch_data_samples):
        label = self._stack_batch_gt(batch_data_samples)
        logits = resize(seg_logits, label.shape[2:], mode='bilinear', align_corners=self.align_corners)
        return dict(loss_own=self.loss_decode(logits, label.squeeze(1), ignore_index=self.ignore_index))


def test_a_feature_head_that_computes_its_losses_itself_logs_through_the_hook(small_config):
    cfg = small_config(BALANCED)
    cfg.model.decode_head.update(type='FeatureHead', base=OwnLossHead)
    record = logged(cfg)[2]
    assert record.keys() >= PARTS


def keys_on_a_rank(text):
    """What a rank of a training run has in its log, and the last value of each part."""
    runner = trained_on_rank(text)
    scalars = runner.message_hub.log_scalars
    return sorted(key for key in scalars if key.startswith('train/')), scalars[
        'train/decode.combined_ce'
    ].current()


def test_two_ranks_have_the_same_keys(small_config):
    cfg = small_config(BALANCED)
    cfg.model.decode_head.type = 'SegformerHead'
    (keys, value), (other_keys, other_value) = on_ranks(2, keys_on_a_rank, cfg.pretty_text)
    assert keys == other_keys
    assert {f'train/{key}' for key in PARTS} <= set(keys)
    assert value != other_value  # each of its own images, as all parts of a log are


def test_losses_of_one_name_add_their_parts(small_config, tmp_path):
    found = []
    for type in ('SegformerHead', 'FeatureSegformerHead'):
        cfg = small_config(BALANCED)
        combined = cfg.model.decode_head.loss_decode
        cfg.model.decode_head.update(type=type, loss_decode=[combined, dict(combined, focal_gamma=2.0)])
        cfg.experiment_name = cfg.visualizer.name = f'{tmp_path.name}-{type}'
        found.append(logged(cfg)[1])
    for record in found:
        total = 0.6 * record['decode.combined_ce'] + 0.4 * record['decode.combined_dice']
        assert record['decode.loss_combined'] == pytest.approx(total, rel=1e-4)


def test_two_heads_have_their_own_keys(small_config):
    cfg = small_config('deeplabv3/deeplabv3_r18-d8-small-combined_1xb8-2k_camvid-240x180')
    cfg.model.decode_head.type = 'ASPPHead'
    del cfg.model.auxiliary_head['base']
    cfg.model.auxiliary_head.type = 'FCNHead'
    record = logged(cfg)[2]
    assert PARTS | {key.replace('decode', 'aux') for key in PARTS} <= record.keys()
