"""Every config of the repository builds and trains; pairs differ in the loss and what serves it alone."""

import json
import re
from pathlib import Path

import pytest
from conftest import REPOSITORY
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.registry import init_default_scope
from mmengine.runner import Runner
from mmseg.registry import DATASETS, MODELS

from mmseg_imbalance.compat import adapt_to_cpu

CONFIGS = sorted(
    str(path.relative_to(REPOSITORY / 'configs').with_suffix(''))
    for path in (REPOSITORY / 'configs').glob('[!_]*/*_*.py')  # of a model and data, unlike a suite
)
BALANCED = [name for name in CONFIGS if '-combined_' in name]
PLAIN = [name.replace('-combined', '') for name in BALANCED]
SUBCLASSIFIED = [name for name in CONFIGS if '-subclass' in name or '-similarity' in name]
SLIDING = [name for name in CONFIGS if '-slide_' in name]
SAMPLED = [name for name in CONFIGS if '-rcs_' in name]


def combined(name):
    """The config that one with a subclassified loss is compared with."""
    return re.sub('-(subclass[^_]*|similarity)_', '-combined_', name)


def test_there_is_a_pair_for_every_model_and_data_set():
    assert len(BALANCED) == 7
    assert set(PLAIN) <= set(CONFIGS)
    trained = {name for name in BALANCED if not name.startswith('experiments/')}
    assert {combined(name) for name in SUBCLASSIFIED if 'subclass' in name} == trained
    assert {combined(name) for name in SUBCLASSIFIED if 'similarity' in name} == trained
    assert len(SAMPLED) == 2
    assert len(SLIDING) == 1


@pytest.mark.parametrize('name', CONFIGS)
def test_two_iterations_and_an_evaluation(small_config, name):
    cfg = small_config(name)
    cfg.default_hooks.checkpoint.save_last = False  # up to 300 MB
    adapt_to_cpu(cfg)  # as tools/train.py does
    runner = Runner.from_cfg(cfg)
    runner.train()
    lines = Path(runner._log_dir, 'vis_data', 'scalars.json').read_text().splitlines()
    records = [json.loads(line) for line in lines]
    losses = [record for record in records if 'loss' in record]
    assert [record['iter'] for record in losses] == [1, 2]
    parts = [key for key in losses[0] if '.loss_' in key]
    assert losses[0]['loss'] == pytest.approx(sum(losses[0][key] for key in parts), rel=1e-4)
    if name in BALANCED:
        heads = ['decode', 'aux'] if 'deeplabv3' in name else ['decode']
        for head in heads:
            assert {f'{head}.loss_combined', f'{head}.combined_ce', f'{head}.combined_dice'} <= set(losses[0])
        assert Path(cfg.work_dir, 'class_weights.json').exists()
    if name in SUBCLASSIFIED:
        assert {'decode.loss_combined', 'decode.loss_subclass'} <= set(losses[0])
        assert ('decode.subclass_smallest_share' in losses[0]) == ('similarity' not in name)
        assert list(Path(runner._log_dir, 'vis_data', 'vis_image').glob('*subclass*.png'))
    assert any(key.startswith('IoU.') for record in records for key in record)


@pytest.mark.parametrize('name', SUBCLASSIFIED)
def test_a_subclassified_loss_takes_a_fifth_of_the_combined_one_and_nothing_else(name):
    ours, base = (
        Config.fromfile(REPOSITORY / 'configs' / f'{n}.py').to_dict() for n in (name, combined(name))
    )
    first, second = ours['model']['decode_head'].pop('loss_decode')
    assert first == base['model']['decode_head'].pop('loss_decode') | dict(loss_weight=0.8)
    assert second['type'] == f'{"Similarity" if "similarity" in name else ""}SubclassifiedLoss'
    assert (second['class_weight'], second['loss_weight']) == ('auto', 0.2)
    assert ours.pop('custom_hooks') == [*base.pop('custom_hooks'), dict(type='SubclassVisualizationHook')]
    assert ours == base


@pytest.mark.parametrize('name', BALANCED)
def test_a_pair_differs_in_the_loss_its_hook_and_the_head_that_serves_it_alone(name):
    plain, balanced = (
        Config.fromfile(REPOSITORY / 'configs' / f'{n}.py').to_dict()
        for n in (name.replace('-combined', ''), name)
    )
    assert plain.pop('custom_hooks') == [dict(type='RunHook')]  # of which ClassWeightHook is one
    assert balanced.pop('custom_hooks') == [dict(type='ClassWeightHook')]
    for key in ('decode_head', 'auxiliary_head'):
        if key in plain['model']:
            for head in (plain['model'][key], balanced['model'][key]):
                head['type'] = head.pop('base', head['type'].removeprefix('Feature'))
                assert head.pop('loss_decode')
    assert balanced == plain


def without_scope(config):
    """Where MMEngine says which package a base is from depends on how a config refers to it."""
    if isinstance(config, dict):
        return {key: without_scope(value) for key, value in config.items() if key != '_scope_'}
    return [without_scope(value) for value in config] if isinstance(config, list) else config


@pytest.mark.parametrize('name', SAMPLED)
def test_rare_class_sampling_changes_the_sampler_its_hook_and_the_crop_alone(name):
    ours, base = (
        without_scope(Config.fromfile(REPOSITORY / 'configs' / f'{n}.py').to_dict())
        for n in (name, name.replace('-rcs', ''))
    )
    sampler = ours['train_dataloader'].pop('sampler')
    assert base['train_dataloader'].pop('sampler')['type'] == 'InfiniteSampler'
    assert ours.pop('custom_hooks') == [*base.pop('custom_hooks'), dict(type='ResumeSamplerHook')]
    assert sampler == dict(type='RareClassSampler', uniform=0, min_pixels=sampler['min_pixels'])
    assert ours['train_pipeline'] == ours['train_dataloader']['dataset']['pipeline']
    for config in (ours, base):
        config['train_pipeline'] = None
    steps = (config['train_dataloader']['dataset']['pipeline'] for config in (ours, base))
    (crop, plain), *others = [(step, other) for step, other in zip(*steps, strict=True) if step != other]
    assert not others
    assert crop == plain | dict(type='RareClassCrop', min_pixels=crop['min_pixels'])
    assert plain.pop('type') == 'RandomCrop'
    assert crop['min_pixels'] < sampler['min_pixels']
    crop.clear(), plain.clear()
    assert ours == base


def test_skeleton_recall_changes_the_loss_its_hook_and_one_transform_alone():
    (name,) = (name for name in CONFIGS if '-skeleton_' in name)
    ours, base = (
        without_scope(Config.fromfile(REPOSITORY / 'configs' / f'{n}.py').to_dict())
        for n in (name, name.replace('-skeleton', '-combined'))
    )
    pipeline = ours['train_dataloader']['dataset'].pop('pipeline')
    assert pipeline == ours.pop('train_pipeline')
    assert pipeline.pop(-2)['type'] == 'SkeletonTubes'
    assert pipeline == base['train_dataloader']['dataset'].pop('pipeline') == base.pop('train_pipeline')
    loss = ours['model']['decode_head'].pop('loss_decode')
    assert loss == base['model']['decode_head'].pop('loss_decode') | dict(type='SkeletonRecallLoss')
    ours.pop('tubes')
    assert ours == base


@pytest.mark.parametrize('name', [name for name in BALANCED + PLAIN + SUBCLASSIFIED if '_cityscapes' in name])
def test_published_settings_keep_the_pretrained_weights(name):
    cfg = Config.fromfile(REPOSITORY / 'configs' / f'{name}.py')
    assert 'resnet50_v1c' in str(cfg.model.pretrained) or 'mit_b0' in cfg.model.backbone.init_cfg.checkpoint


@pytest.mark.parametrize('name', SLIDING)
def test_a_sliding_window_differs_in_the_test_alone(name):
    ours, base = (
        Config.fromfile(REPOSITORY / 'configs' / f'{n}.py').to_dict()
        for n in (name, name.replace('-slide', ''))
    )
    window = ours['model'].pop('test_cfg')
    assert base['model'].pop('test_cfg')['mode'] == 'whole'
    assert (window['mode'], window['crop_size']) == ('slide', ours['crop_size'])
    assert all(0 < step < size for step, size in zip(window['stride'], window['crop_size'], strict=True))
    scales, rest = [], []
    for one in (ours, base):
        steps = one.pop('test_pipeline')
        for split in ('val', 'test'):
            assert one[f'{split}_dataloader']['dataset'].pop('pipeline') == steps
        scales += [step.pop('scale') for step in steps if 'scale' in step]
        rest.append(steps)
    assert rest[0] == rest[1]
    (larger, _), (width, _) = scales
    (resize,) = [step for step in base['train_pipeline'] if step['type'] == 'RandomResize']
    assert width < larger <= width * resize['ratio_range'][1]
    assert ours == base


@pytest.mark.parametrize('name', [name for name in CONFIGS if 'resunet' in name and 'tversky' in name])
def test_a_binary_resunet_has_the_same_head_on_every_level_of_the_decoder(name):
    model = Config.fromfile(REPOSITORY / 'configs' / f'{name}.py').model
    width = model.backbone.base_channels
    heads = [model.decode_head, *model.auxiliary_head]
    assert [(head.in_index, head.in_channels) for head in heads] == [(4 - k, width * 2**k) for k in range(4)]
    weights = [head.loss_decode.pop('loss_weight') for head in heads]
    assert weights == sorted(weights, reverse=True)
    for head in heads:
        assert (head.num_classes, head.out_channels, head.threshold) == (2, 1, 0.5)
        defects = 'defect' in name  # of which many images have none
        norm = dict(type='BN') if defects else dict(type='GN', num_groups=8)
        assert head.norm_cfg == model.backbone.norm_cfg == norm
        tversky = dict(alpha=0.3, beta=0.7, gamma=0.75, class_weight='auto')
        loss = dict(type='WeightedTverskyLoss')
        if defects:
            loss = dict(type='CombinedWeightedLoss', region='tversky', region_reduction='batch')
        assert head.loss_decode == dict(**loss, **tversky)


@pytest.mark.slow
def test_aerial_images_are_tested_in_windows_and_lose_small_regions(small_config, monkeypatch):
    (name,) = (name for name in CONFIGS if 'loveda' in name)
    cfg = Config.fromfile(REPOSITORY / 'configs' / f'{name}.py')
    window = cfg.model.test_cfg
    assert (window.mode, window.crop_size) == ('slide', cfg.crop_size)
    cfg = small_config(name)
    cfg.model.test_cfg = dict(mode='slide', crop_size=(64, 64), stride=(43, 43))
    cfg.model.backbone.base_channels = 4
    cfg.model.decode_head.in_channels, cfg.model.auxiliary_head.in_channels = 4, 8
    areas = []

    def recorded(labels, area):
        areas.append((labels.shape, area))
        return labels

    monkeypatch.setattr('mmseg_imbalance.decisions.remove_small', recorded)
    adapt_to_cpu(cfg)
    Runner.from_cfg(cfg).test()
    assert areas == [((72, 96), 100)] * 2


@pytest.mark.slow
@pytest.mark.parametrize('name', SLIDING)
def test_a_sliding_window_covers_the_image_in_windows_of_the_training_size(camvid, monkeypatch, name):
    cfg = Config.fromfile(REPOSITORY / 'configs' / f'{name}.py')
    init_default_scope(cfg.default_scope)
    cfg.test_dataloader.dataset.data_root = str(camvid)
    dataset = DATASETS.build(cfg.test_dataloader.dataset)
    model = MODELS.build(cfg.model).eval()
    windows, encode_decode = [], model.encode_decode

    def recorded(inputs, metas):
        windows.append(inputs.shape[2:])
        return encode_decode(inputs, metas)

    monkeypatch.setattr(model, 'encode_decode', recorded)
    (sample,) = model.test_step(pseudo_collate([dataset[0]]))
    assert windows == [cfg.crop_size] * 4
    assert sample.pred_sem_seg.shape == (72, 96)
