"""Training and testing, run as a user runs them: as processes, from the repository's folder."""

import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from PIL import Image
from processes import run, succeed
from ranks import free_port

from mmseg_imbalance.commands import main
from mmseg_imbalance.predictions import load_prediction

pytestmark = pytest.mark.slow

PLAIN = 'configs/segformer/segformer_mit-b0-small_1xb8-2k_longtail-cityscapes-256x128.py'
BALANCED = 'configs/segformer/segformer_mit-b0-small-combined_1xb8-2k_longtail-cityscapes-256x128.py'


def small(scenes, iterations=2):
    """The options that make a run of these configs small."""
    splits = ('train', 'val', 'test')
    return [
        '--cfg-options',
        *(f'{split}_dataloader.dataset.data_root={scenes}' for split in splits),
        *(f'{split}_dataloader.num_workers=0' for split in splits),
        *(f'{split}_dataloader.persistent_workers=False' for split in splits),
        'train_dataloader.batch_size=2',
        f'train_cfg.max_iters={iterations}',
        f'train_cfg.val_interval={iterations}',
        'default_hooks.checkpoint.interval=1',
        'default_hooks.logger.interval=1',
    ]


def losses(output):
    return [float(value) for value in re.findall(r'Iter\(train\).* loss: ([\d.]+)', output)]


def test_train_resume_and_test(scenes, tmp_path):
    train = [sys.executable, 'tools/train.py', BALANCED, '--work-dir', tmp_path]
    assert len(losses(succeed(*train, *small(scenes)))) == 2
    resumed = succeed(*train, '--resume', *small(scenes, iterations=3))
    assert 'resumed epoch: 0, iter: 2' in resumed
    assert 'weights of the checkpoint' in resumed
    assert len(losses(resumed)) == 1

    checkpoint = tmp_path / 'iter_3.pth'
    test = [sys.executable, 'tools/test.py', BALANCED, checkpoint, '--work-dir', tmp_path / 'test']
    output = succeed(
        *test,
        '--out',
        tmp_path / 'maps',
        '--show-dir',
        tmp_path / 'painted',
        '--save-predictions',
        *small(scenes),
        'default_hooks.visualization.interval=1',
    )
    assert 'mIoU' in output
    assert len(list((tmp_path / 'maps').glob('*.png'))) == 2
    assert len(list((tmp_path / 'painted').rglob('*.png'))) == 2
    folder = next((tmp_path / 'test').glob('*/predictions'))
    for path in (tmp_path / 'maps').glob('*.png'):
        found = load_prediction(folder, path.name)
        assert np.array_equal(found.prediction, Image.open(path))
        assert Path(found.image).exists()
        assert found.truth.shape == found.prediction.shape
    results = json.loads(next((tmp_path / 'test').glob('*/*.json')).read_text())
    assert {'mIoU', 'IoU.road', 'IoU.car'} <= set(results)

    # road is the most frequent class: with tau far below 0 nothing else is predicted, whatever was learnt
    adjusted = succeed(*test, '--logit-adjustment=-50', *small(scenes))
    assert '-50.0 * ln f_c is subtracted' in adjusted
    newest = max((tmp_path / 'test').glob('*/*.json'), key=lambda path: path.stat().st_mtime)
    shifted = json.loads(newest.read_text())
    assert shifted['aAcc'] == pytest.approx(shifted['IoU.road'])  # nothing but the right pixels of road
    assert shifted['IoU.building'] == shifted['IoU.car'] == 0
    assert shifted['aAcc'] != results['aAcc']


def test_amp_trains(scenes, tmp_path):
    output = succeed(
        sys.executable, 'tools/train.py', BALANCED, '--amp', '--work-dir', tmp_path, *small(scenes)
    )
    plain = succeed(sys.executable, 'tools/train.py', BALANCED, '--work-dir', tmp_path, *small(scenes))
    assert 'AmpOptimWrapper' in output
    assert losses(output) == pytest.approx(losses(plain), rel=0.05)


def test_two_processes_train_through_dist_train(scenes, tmp_path):
    output = succeed(
        'tools/dist_train.sh', BALANCED, 2, '--work-dir', tmp_path, *small(scenes), PORT=free_port()
    )
    assert 'GPU number: 2' in output or 'Distributed training: True' in output
    assert len(losses(output)) == 2
    assert (tmp_path / 'iter_2.pth').exists()


def test_dist_train_without_arguments_says_how():
    code, output = run('tools/dist_train.sh')
    assert code == 2
    assert 'CONFIG GPUS' in output


def test_the_frameworks_own_train_script_needs_custom_imports_alone(scenes, tmp_path):
    import mmseg

    framework = Path(mmseg.__file__).parent / '.mim'
    config = tmp_path / 'config.py'
    config.write_text(f"""
_base_ = [
    r'{framework}/configs/_base_/models/segformer_mit-b0.py',
    r'{framework}/configs/_base_/datasets/cityscapes.py',
    r'{framework}/configs/_base_/default_runtime.py',
    r'{framework}/configs/_base_/schedules/schedule_40k.py',
]
custom_imports = dict(imports=['mmseg_imbalance'])
custom_hooks = [dict(type='ClassWeightHook')]
crop_size = (64, 64)
model = dict(
    data_preprocessor=dict(size=crop_size),
    decode_head=dict(
        loss_decode=dict(_delete_=True, type='CombinedWeightedLoss', class_weight='auto')
    ),
)
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='RandomCrop', crop_size=crop_size),
    dict(type='PackSegInputs'),
]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs'),
]
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
""")
    output = succeed(
        sys.executable,
        framework / 'tools' / 'train.py',
        config,
        '--work-dir',
        tmp_path / 'run',
        *small(scenes),
    )
    assert len(losses(output)) == 2
    assert 'decode.combined_dice' in output


def test_unknown_config_and_options_end_without_a_traceback(tmp_path):
    code, output = run(sys.executable, 'tools/train.py', tmp_path / 'nothing.py')
    assert code == 2
    assert output.strip().splitlines()[-1].endswith(f'argument config: {tmp_path / "nothing.py"} is no file')


def test_small_regions_are_removed_from_whatever_is_predicted(scenes, tmp_path):
    from mmengine.config import Config
    from mmseg.registry import MODELS

    from mmseg_imbalance.components import components, remove_small

    config = tmp_path / 'config.py'
    config.write_text(f"""
_base_ = [r'{REPOSITORY / PLAIN}']
resizes = [dict(type='Resize', scale_factor=factor, keep_ratio=True) for factor in (1.0, 2.0)]
steps = [resizes, [dict(type='LoadAnnotations')], [dict(type='PackSegInputs')]]
tta_pipeline = [dict(type='LoadImageFromFile'), dict(type='TestTimeAug', transforms=steps)]
""")
    # a segmentor of chance paints many small regions; it predicts a logit for every fourth pixel
    torch.manual_seed(0)
    model = MODELS.build(Config.fromfile(config).model)
    torch.nn.init.normal_(model.decode_head.conv_seg.weight)
    checkpoint = tmp_path / 'chance.pth'
    torch.save(dict(state_dict=model.state_dict()), checkpoint)

    def predict(name, *options, command=(sys.executable,)):
        folder = tmp_path / name
        options = [*options, '--out', folder / 'maps', '--work-dir', folder, '--show-dir', folder / 'painted']
        output = succeed(
            *command,
            'tools/test.py',
            config,
            checkpoint,
            *options,
            *small(scenes),
            'default_hooks.visualization.interval=1',
            'test_dataloader.batch_size=2',
        )
        assert 'do not match' not in output  # the checkpoint and the model
        (results,) = folder.glob('*/*.json')
        maps = {path.name: np.array(Image.open(path)) for path in (folder / 'maps').glob('*.png')}
        assert len(maps) == 2
        return json.loads(results.read_text()), maps

    def as_if_removed(plain, cleaned):
        assert cleaned[0]['mIoU'] != plain[0]['mIoU']
        for name, labels in plain[1].items():
            assert components(labels)[1].min() < 100 <= components(cleaned[1][name])[1].min()
            assert np.array_equal(cleaned[1][name], remove_small(labels, 100))

    def painted(name):
        pictures = [path.read_bytes() for path in sorted((tmp_path / name / 'painted').rglob('*.png'))]
        assert len(pictures) == 2
        return pictures

    plain = predict('plain')
    as_if_removed(plain, predict('cleaned', '--remove-small', 100))
    assert all(a != b for a, b in zip(painted('plain'), painted('cleaned'), strict=True))
    launch = ['-m', 'torch.distributed.run', '--nproc-per-node', 2, '--master-port', free_port()]
    ranks = [sys.executable, *launch]
    options = ['--tta', '--decide', 'rankseg-iou']
    augmented = predict('augmented', *options)
    assert any((augmented[1][name] != labels).any() for name, labels in plain[1].items())
    options += ['--remove-small', 100, '--launcher', 'pytorch']
    as_if_removed(augmented, predict('ranks', *options, command=ranks))


def test_one_rank_writes_the_results(scenes, tmp_path):
    """MMEngine's logger lets every rank write the same file at once, which mixed their texts."""
    (tmp_path / 'late.py').write_text("""
import time
from mmengine.hooks import Hook
from mmengine.registry import HOOKS

@HOOKS.register_module()
class LateRank(Hook):
    def after_test_epoch(self, runner, metrics=None):
        runner.message_hub.update_scalar('test/rank', float(runner.rank))
        time.sleep(runner.rank)
""")
    config = tmp_path / 'config.py'
    config.write_text(f"""
_base_ = [r'{REPOSITORY / PLAIN}']
custom_imports = dict(imports=['mmseg_imbalance', 'late'], allow_failed_imports=False)
custom_hooks = [dict(type='LateRank', priority='HIGHEST')]
""")
    checkpoint = tmp_path / 'empty.pth'
    torch.save(dict(state_dict={}), checkpoint)
    succeed(
        *(sys.executable, '-m', 'torch.distributed.run', '--nproc-per-node', 2, '--master-port', free_port()),
        *('tools/test.py', config, checkpoint, '--work-dir', tmp_path, '--launcher', 'pytorch'),
        *small(scenes),
        PYTHONPATH=os.pathsep.join([str(tmp_path), str(REPOSITORY)]),
    )
    (results,) = tmp_path.glob('*/*.json')
    assert json.loads(results.read_text())['rank'] == 0


def test_an_area_to_remove_is_a_positive_number_of_pixels(capsys):
    for area in ('0', '2.5'):
        with pytest.raises(SystemExit) as end:
            main(['test', PLAIN, 'none.pth', f'--remove-small={area}'])
        assert end.value.code == 2
        output = capsys.readouterr().err
        assert f'must be a whole number of pixels, at least 1, got {area!r}' in output
        assert 'Traceback' not in output
