"""What ``pip install`` gives: the wheel made from the source distribution, used outside the checkout."""

import json
import os
import shutil
import sys
import tarfile
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import processes
import pytest
import yaml
from conftest import REPOSITORY
from PIL import Image

pytestmark = pytest.mark.slow

FRAMEWORK = ('mmseg', 'mmcv', 'mmengine')
CORE = (
    'ops', 'functional', 'terms', 'frequency', 'weighting', 'clustering', 'class_weight', 'counting',
    'scores', 'tables', 'scenes.dataset',
)  # fmt: skip
# hides what it is given; torch is absent where a package is built in isolation
HIDE = 'import sys; sys.modules.update(dict.fromkeys({names!r})); '
CONFIG = """
_base_ = ['mmseg::_base_/models/segformer_mit-b0.py', 'mmseg::_base_/default_runtime.py']
custom_imports = dict(imports=['mmseg_imbalance'])
custom_hooks = [dict(type='ClassWeightHook')]
crop_size = (64, 64)
losses = [
    dict(type='CombinedWeightedLoss', class_weight='auto'),
    dict(type='SubclassifiedLoss', class_weight='auto', num_subclasses=2),
]
head = dict(_delete_=True, type='FeatureSegformerHead', in_channels=[32, 64, 160, 256], in_index=[0, 1, 2, 3])
head.update(channels=64, num_classes=3, norm_cfg=dict(type='BN'), loss_decode=losses)
model = dict(data_preprocessor=dict(size=crop_size), backbone=dict(init_cfg=None), decode_head=head)
load = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations')]
data = dict(
    type='BaseSegDataset',
    data_root='data',
    data_prefix=dict(img_path='images', seg_map_path='labels'),
    metainfo=dict(classes=['ground', 'thing', 'rare']),
    pipeline=[*load, dict(type='RandomCrop', crop_size=crop_size), dict(type='PackSegInputs')],
)
train_dataloader = dict(batch_size=2, sampler=dict(type='InfiniteSampler'), dataset=data)
val_dataloader = dict(
    batch_size=1,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(data, pipeline=[*load, dict(type='PackSegInputs')]),
)
test_dataloader = val_dataloader
val_evaluator = test_evaluator = dict(type='ImbalanceIoUMetric')
optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=1e-4))
train_cfg = dict(type='IterBasedTrainLoop', max_iters=2, val_interval=2)
val_cfg, test_cfg = dict(type='ValLoop'), dict(type='TestLoop')
default_hooks = dict(
    logger=dict(type='LoggerHook', interval=1, log_metric_by_epoch=False),
    checkpoint=dict(type='CheckpointHook', interval=2, by_epoch=False),
)
"""


# processes that do not know the checkout
run = partial(processes.run, PYTHONPATH='', PATH=os.environ['PATH'])
succeed = partial(processes.succeed, PYTHONPATH='', PATH=os.environ['PATH'])


@pytest.fixture(scope='module')
def distributions(tmp_path_factory):
    """A source distribution and the wheel that is built from it, without torch and without a network."""
    folder = tmp_path_factory.mktemp('distributions')

    def unwanted(path, names):
        at_top = {'build', 'data', 'demo', 'work_dirs'} if Path(path) == REPOSITORY else set()
        return [
            n for n in names if n.startswith('.') or n in at_top or n.endswith(('.egg-info', '__pycache__'))
        ]

    shutil.copytree(REPOSITORY, folder / 'checkout', ignore=unwanted)
    build = HIDE.format(names=('torch', *FRAMEWORK)) + 'from setuptools import build_meta; '
    succeed(sys.executable, '-c', f'{build}build_meta.build_sdist({str(folder)!r})', cwd=folder / 'checkout')
    (source,) = folder.glob('*.tar.gz')
    with tarfile.open(source) as archive:
        archive.extractall(folder / 'unpacked')
    (unpacked,) = (folder / 'unpacked').iterdir()
    succeed(sys.executable, '-c', f'{build}build_meta.build_wheel({str(folder)!r})', cwd=unpacked)
    (wheel,) = folder.glob('*.whl')
    return source, wheel


@pytest.fixture(scope='module')
def outside(distributions, tmp_path_factory):
    """A folder outside the checkout with an environment in env/ and, for training, data/ and config.py.

    The environment has the wheel, and sees the packages of the running one after its own.
    """
    folder = tmp_path_factory.mktemp('outside')
    succeed(sys.executable, '-m', 'venv', '--without-pip', 'env', cwd=folder)
    pip = [sys.executable, '-m', 'pip', '--python', folder / 'env' / 'bin' / 'python', 'install', '--quiet']
    succeed(*pip, '--no-deps', '--no-index', '--no-compile', distributions[1], cwd=folder)
    (site,) = (folder / 'env' / 'lib').glob('*/site-packages')
    packages = [path for path in sys.path if Path(path).name in ('site-packages', 'dist-packages')]
    (site / 'packages_of_the_tests.pth').write_text('\n'.join(packages))

    rng = np.random.default_rng(0)
    for kind in ('images', 'labels'):
        (folder / 'data' / kind).mkdir(parents=True)
    for i in range(2):
        label = np.kron(rng.choice(3, (6, 8), p=[0.7, 0.2, 0.1]), np.ones((16, 16))).astype(np.uint8)
        Image.fromarray(label).save(folder / 'data' / 'labels' / f'{i}.png')
        picture = rng.integers(0, 256, (*label.shape, 3), dtype=np.uint8)
        Image.fromarray(picture).save(folder / 'data' / 'images' / f'{i}.jpg')
    (folder / 'config.py').write_text(CONFIG)
    return folder


@pytest.fixture(scope='module')
def package(outside):
    """The folder of the installed package."""
    (path,) = (outside / 'env' / 'lib').glob('*/site-packages/mmseg_imbalance')
    return path


@pytest.fixture(scope='module')
def trained(outside, package):
    """Output of two iterations of the config, by the installed train.py, in run/."""
    python = outside / 'env' / 'bin' / 'python'
    train = package / '.mim' / 'tools' / 'train.py'
    return succeed(python, train, 'config.py', '--work-dir', 'run', cwd=outside)


def command(outside, *arguments):
    """The console command of the environment."""
    return succeed(outside / 'env' / 'bin' / 'mmseg-imbalance', *arguments, cwd=outside)


def test_the_wheel_holds_what_a_user_needs(distributions):
    source, wheel = distributions
    files = {str(p.relative_to(REPOSITORY)) for p in REPOSITORY.glob('configs/**/*') if p.is_file()}
    files |= {'tools/train.py', 'tools/test.py', 'tools/launch.py', 'tools/dist_train.sh', 'model-index.yml'}
    files = {name for name in files if '__pycache__' not in name}
    assert len(files) > 30
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f'mmseg_imbalance/.mim/{name}' for name in files} <= names
    assert {'mmseg_imbalance/py.typed', 'mmseg_imbalance/ops/triton.py'} <= names
    tops = {name.split('/')[0].partition('-')[0] for name in names}
    assert tops == {'mmseg_imbalance'}
    assert not {f'mmseg_imbalance/.mim/tools/{name}.py' for name in ('wheel', 'bench_gpu')} & names
    with tarfile.open(source) as archive:
        held = {name.partition('/')[2] for name in archive.getnames()}
    assert files | {'tests/conftest.py', 'tools/wheel.py', 'Makefile', 'README.md', 'LICENSE'} <= held


def test_the_index_of_models_lists_every_metafile():
    index = yaml.safe_load((REPOSITORY / 'model-index.yml').read_text())
    found = REPOSITORY.glob('configs/[!_]*/metafile.yaml')
    assert index['Import'] == sorted(str(path.relative_to(REPOSITORY)) for path in found)


def test_the_core_needs_no_mmsegmentation(outside, package):
    modules = ', '.join(f'mmseg_imbalance.{name}' for name in CORE)
    code = HIDE.format(names=FRAMEWORK) + f'import {modules}; print(mmseg_imbalance.__file__)'
    output = succeed(outside / 'env' / 'bin' / 'python', '-c', code, cwd=outside)
    assert output.strip() == str(package / '__init__.py')


def test_without_mmsegmentation_a_command_says_what_to_install(outside):
    code = HIDE.format(names=FRAMEWORK) + 'from mmseg_imbalance.commands import main; sys.exit(main())'
    python = outside / 'env' / 'bin' / 'python'
    status, output = run(python, '-c', code, 'compare', 'run', cwd=outside)
    assert status == 1
    assert output.startswith('mmseg-imbalance compare: ')
    assert "pip install 'mmseg-imbalance[onedl]'" in output
    assert 'Traceback' not in output
    assert 'make-scenes' in succeed(python, '-c', code, '--help', cwd=outside)


def test_a_config_trains_from_the_installed_files_alone(outside, package, trained):
    assert 'Iter(train) [2/2]' in trained
    assert 'decode.loss_subclass' in trained
    assert (outside / 'run' / 'iter_2.pth').exists()
    weights = json.loads((outside / 'run' / 'class_weights.json').read_text())
    assert weights['classes'] == ['ground', 'thing', 'rare']
    code = 'import mmseg_imbalance; print(mmseg_imbalance.__file__)'
    output = succeed(outside / 'env' / 'bin' / 'python', '-c', code, cwd=outside)
    assert str(package / '__init__.py') in output.splitlines()


def test_installed_configs_find_their_bases(outside):
    code = (
        'import mmseg_imbalance.compat; from mmengine.config import Config; '
        'from mmseg_imbalance.shipped import configs; '
        'first = [min(family.glob("*.py")) for family in configs().glob("[!_]*")]; '
        'print(*(Config.fromfile(path).train_dataloader.batch_size for path in first))'
    )
    output = succeed(outside / 'env' / 'bin' / 'python', '-c', code, cwd=outside).splitlines()[-1]
    assert len(output.split()) == len(list(REPOSITORY.glob('configs/[!_]*')))


def test_a_config_of_the_package_is_a_base(outside):
    base = 'mmseg_imbalance::segformer/segformer_mit-b0-combined_8xb1-160k_cityscapes-1024x1024.py'
    (outside / 'based.py').write_text(f"_base_ = '{base}'")
    code = (
        'import mmseg_imbalance; from mmengine.config import Config; '
        "print(Config.fromfile('based.py').model.decode_head.loss_decode.type)"
    )
    output = succeed(outside / 'env' / 'bin' / 'python', '-c', code, cwd=outside)
    assert output.splitlines()[-1] == 'CombinedWeightedLoss'


def test_class_weights_of_own_data(outside):
    output = command(outside, 'class-weights', 'config.py', '--out', 'weights.json', '--workers', 0)
    assert ' thing ' in output
    assert len(json.loads((outside / 'weights.json').read_text())['weights']) == 3


def test_compare_and_subclasses_read_what_training_left(outside, trained):
    output = command(outside, 'compare', 'run', '--out', 'comparison')
    assert 'mIoU.tail' in output
    assert (outside / 'comparison' / 'comparison.html').exists()
    command(outside, 'subclasses', 'config.py', 'run/iter_2.pth', '--images', 1)
    assert (outside / 'run' / 'iter_2_subclasses.html').exists()


def test_the_other_commands(outside, trained):
    options = ['--device', 'cpu', '--size', '24x40', '--classes', 3, '--rounds', 1, '--scale', 1]
    assert 'ours, eager' in command(outside, 'benchmark', *options, '--backend', 'eager', '--no-competitors')
    command(outside, 'make-scenes', 'scenes', '--train', 1, '--val', 1, '--size', '64x32', '--workers', 1)
    assert len(list((outside / 'scenes').rglob('*.png'))) == 4
    assert 'mIoU' in command(outside, 'test', 'config.py', 'run/iter_2.pth', '--work-dir', 'tested')
    assert 'demo' in command(outside, 'demo', '--help')
