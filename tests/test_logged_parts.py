"""The parts of a loss in the log of a run, with MMSegmentation's heads and with ours."""

import json
from pathlib import Path

import pytest
from mmengine.runner import Runner

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
    'hooks', [['ClassWeightHook'], ['ClassBalanceHook'], ['ClassWeightHook', 'ClassBalanceHook'], []]
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


def test_two_heads_have_their_own_keys(small_config):
    cfg = small_config('deeplabv3/deeplabv3_r18-d8-small-combined_1xb8-2k_camvid-240x180')
    cfg.model.decode_head.type = 'ASPPHead'
    del cfg.model.auxiliary_head['base']
    cfg.model.auxiliary_head.type = 'FCNHead'
    record = logged(cfg)[2]
    assert PARTS | {key.replace('decode', 'aux') for key in PARTS} <= record.keys()
