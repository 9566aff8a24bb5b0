import functools
import gc
import logging
import os
import pickle
import shutil
import time
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

# Tests run side by side, a core each, and so do processes that they start. Read when torch is imported.
os.environ['OMP_NUM_THREADS'] = os.environ['MKL_NUM_THREADS'] = '1'

import numpy as np
import pytest
import torch
from PIL import Image

torch.set_num_threads(1)
REPOSITORY = Path(__file__).parents[1]
if not torch.cuda.is_available():
    # read once, when triton is imported
    os.environ.setdefault('TRITON_INTERPRET', '1')
import mmseg_imbalance  # noqa: E402, F401  registers everything, and where mmseg:: bases are found
from mmseg_imbalance.ops.soft_stats import _compiled_backend  # noqa: E402

cpu = _compiled_backend('cpu')
needs_numba = pytest.mark.skipif(isinstance(cpu, str), reason=str(cpu))
triton = _compiled_backend('triton')
needs_triton = pytest.mark.skipif(isinstance(triton, str), reason=str(triton))
# without a device, Triton's interpreter runs the kernels
DEVICE = torch.device('cuda' if torch.cuda.is_available() else 'cpu')


class Payload:
    """A pickle of it makes a folder when it is loaded."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def pytest_collection_modifyitems(items):
    """What takes a small config trains with it."""
    for item in items:
        if 'small_config' in item.fixturenames:
            item.add_marker(pytest.mark.slow)


def pytest_collection_finish():
    """MMEngine collects garbage for every data set that it makes: not in all that is imported by now."""
    gc.freeze()


def let_runs_start_at_once(patch):
    """MMEngine lays out configs, asks for compilers and reads its model zoo, a second for each run."""
    from mmengine.config import utils
    from mmengine.runner import runner

    def as_it_is(text, **options):
        return text, True

    try:
        patch.setattr('yapf.yapflib.yapf_api.FormatCode', as_it_is)
    except (EOFError, pickle.UnpicklingError):  # in a new environment another worker just writes YAPF's cache
        time.sleep(2)
        patch.setattr('yapf.yapflib.yapf_api.FormatCode', as_it_is)
    patch.setattr('mmengine.config.config.FormatCode', as_it_is, raising=False)
    patch.setattr(runner, 'collect_env', functools.cache(runner.collect_env))
    patch.setattr(utils, 'load', functools.cache(utils.load))


def let_runs_have_folders_of_their_own(patch):
    """MMEngine names the folder of a run's logs by the second, and two short runs start within one."""
    from mmengine.runner import runner

    latest = [0.0]

    def later():
        latest[0] = max(time.time(), latest[0] + 1)
        return latest[0]

    clock = SimpleNamespace(time=later, strftime=time.strftime, localtime=time.localtime)
    patch.setattr(runner, 'time', clock)


@pytest.fixture(autouse=True, scope='session')
def runs_start_at_once():
    with pytest.MonkeyPatch.context() as patch:
        if find_spec('mmengine') is not None:
            let_runs_start_at_once(patch)
            let_runs_have_folders_of_their_own(patch)
        yield


@pytest.fixture(autouse=True)
def nothing_of_other_runs():
    """MMEngine's default scope and the data set's classes outlive the run that set them: not the test."""
    yield
    if find_spec('mmengine') is not None:
        from mmengine.logging import MessageHub
        from mmengine.registry import DefaultScope

        MessageHub._instance_dict.clear()
        DefaultScope._instance_dict.clear()


@pytest.fixture
def logged(monkeypatch):
    """(level, text) of what counting logs."""
    messages = []

    def log(message, logger=None, level=logging.INFO):
        messages.append((level, message))

    monkeypatch.setattr('mmengine.logging.print_log', log)
    return messages


@pytest.fixture
def warned(monkeypatch):
    """The warnings of counting."""
    messages = []

    def log(message, logger=None, level=logging.INFO):
        if level >= logging.WARNING:
            messages.append(message)

    monkeypatch.setattr('mmengine.logging.print_log', log)
    return messages


@pytest.fixture
def save(tmp_path):
    """Write a label image of each list of values; the folder of the data set."""

    def write(*files):
        for name in ('img', 'ann'):
            (tmp_path / name).mkdir(exist_ok=True)
        for at, values in enumerate(files):
            labels = np.repeat(np.array(values), 6).reshape(-1, 3)
            Image.fromarray(labels.astype(np.uint8)).save(tmp_path / 'ann' / f'{at}.png')
            (tmp_path / 'img' / f'{at}.jpg').touch()
        return tmp_path

    return write


@pytest.fixture(autouse=True, scope='session')
def user_cache(tmp_path_factory):
    """The user's own cache folder is left alone, by the commands that tests start too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('MMSEG_IMBALANCE_CACHE', str(tmp_path_factory.mktemp('cache')))
        yield


@pytest.fixture(autouse=True, scope='session')
def nothing_is_left():
    """Tests write into their temporary folders alone: neither into the checkout nor into the user's cache."""
    by_tools = ('.', '__pycache__', '_build', 'build', 'dist', 'generated')  # of pytest, pip and Sphinx

    def files():
        for root in (REPOSITORY, Path.home() / '.cache' / 'mmseg_imbalance'):
            for path, folders, names in os.walk(root):
                folders[:] = [f for f in folders if not f.startswith(by_tools) and not f.endswith('egg-info')]
                yield from (os.path.join(path, name) for name in names)

    before = set(files())
    yield
    assert not set(files()) - before


@pytest.fixture(scope='session')
def scenes(tmp_path_factory):
    """A small generated data set in the Cityscapes layout: 6 train and 2 val images of 128x64."""
    from mmseg_imbalance.scenes.dataset import generate

    root = tmp_path_factory.mktemp('data') / 'scenes'
    generate(root, train=6, val=2, size=(128, 64), workers=1)
    return root


def noise(root, labels):
    """Write noise in the CamVid layout: 4 train and 2 val images of 96x72, labels below `labels`."""
    rng = np.random.default_rng(0)
    for split, count in (('train', 4), ('val', 2)):
        for kind in ('images', 'annotations'):
            (root / kind / split).mkdir(parents=True)
        for i in range(count):
            image = Image.fromarray(rng.integers(0, 256, (72, 96, 3), dtype=np.uint8))
            image.save(root / 'images' / split / f'{i}.jpg')
            label = np.kron(rng.integers(0, labels, (6, 8), dtype=np.uint8), np.ones((12, 12), np.uint8))
            Image.fromarray(label).save(root / 'annotations' / split / f'{i}.png')
    return root


def recoloured(camvid, folder, label=None):
    """A copy of the data in which a label has become road."""
    shutil.copytree(camvid, folder, dirs_exist_ok=True)
    for path in (folder / 'annotations' / 'train').glob('*.png'):
        pixels = np.array(Image.open(path))
        Image.fromarray(np.where(pixels == label, 3, pixels).astype(np.uint8)).save(path)
    return str(folder)


@pytest.fixture(scope='session')
def camvid(tmp_path_factory):
    """Noise with the labels of CamVid's 11 classes and of what is unlabelled."""
    return noise(tmp_path_factory.mktemp('data') / 'camvid', 12)


@pytest.fixture(scope='session')
def four_classes(tmp_path_factory):
    """Noise in the layout of CamVid, with the labels of any data set of four classes or more."""
    return noise(tmp_path_factory.mktemp('data') / 'four_classes', 4)


@pytest.fixture(scope='session')
def two_classes(tmp_path_factory):
    """The same of an object against the background."""
    return noise(tmp_path_factory.mktemp('data') / 'two_classes', 2)


@pytest.fixture
def small_config(scenes, camvid, four_classes, two_classes, tmp_path):
    """Factory of a config of this repository made small: two iterations on 64x64 crops, no weights loaded."""
    from mmengine.config import Config

    def shrink(pipeline):
        for step in pipeline:
            if 'scale' in step:
                step.scale = (128, 64)
            if 'crop_size' in step:
                step.crop_size = (64, 64)
            if 'min_pixels' in step:
                step.min_pixels = 1

    def make(name, **options):
        cfg = Config.fromfile(REPOSITORY / 'configs' / f'{name}.py')
        named = dict(cityscapes=scenes, camvid=camvid, chase=two_classes)
        data = next((folder for part, folder in named.items() if part in name), four_classes)
        for split in ('train', 'val', 'test'):
            loader = cfg[f'{split}_dataloader']
            loader.update(num_workers=0, persistent_workers=False)
            dataset = loader.dataset.get('dataset', loader.dataset)  # the one that is repeated
            dataset.data_root = str(data)
            if data != scenes:
                folder = 'train' if split == 'train' else 'val'
                dataset.data_prefix = dict(img_path=f'images/{folder}', seg_map_path=f'annotations/{folder}')
                dataset.update(img_suffix='.jpg', seg_map_suffix='.png')
            shrink(dataset.pipeline)
        cfg.train_dataloader.batch_size = 2
        if 'min_pixels' in cfg.train_dataloader.sampler:
            cfg.train_dataloader.sampler.min_pixels = 1
        cfg.train_cfg.update(max_iters=2, val_interval=2)
        cfg.model.update(pretrained=None, test_cfg=dict(mode='whole'))
        weights = 'pretrained' if cfg.model.backbone.type == 'EfficientNetLite0' else 'init_cfg'
        cfg.model.backbone[weights] = None
        cfg.model.data_preprocessor.size = (64, 64)
        cfg.default_hooks.logger.interval = 1
        cfg.randomness = dict(seed=0)
        cfg.work_dir = str(tmp_path / 'work_dir')
        # MMEngine's instances are global by name
        cfg.experiment_name = cfg.visualizer.name = tmp_path.name
        cfg.merge_from_dict(options)
        return cfg

    return make


@pytest.fixture
def uninitialised_is_nan():
    """Every fresh allocation is filled with NaN, so that a value nobody wrote cannot go unnoticed."""
    # on a device, eager and strips use operations that have no deterministic form
    torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
    if hasattr(torch.utils, 'deterministic'):  # torch 2.2; the row with an older one does without
        torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def make_batch():
    """Factory of (logits, target): half of the pixels confident, 15 % ignored, one class absent."""

    def make(logit_size=(13, 17), label_size=(13, 17), classes=5, batch=2, seed=0, dtype=torch.float64):
        rng = np.random.default_rng(seed)
        target = rng.integers(0, classes - 1, (batch, *label_size))  # the last class never occurs
        logits = rng.normal(0, 2, (batch, classes, *logit_size))
        # random logits hide cancellation: lift the class that most of a cell's pixels have by 10
        rows = np.arange(logit_size[0]) * label_size[0] // logit_size[0]
        cols = np.arange(logit_size[1]) * label_size[1] // logit_size[1]
        label = target[:, rows][:, :, cols]
        lifted = rng.random(label.shape) < 0.5
        for c in range(classes):
            logits[:, c][lifted & (label == c)] += 10
        target[rng.random(target.shape) < 0.15] = 255
        return torch.tensor(logits, dtype=dtype), torch.tensor(target)

    return make
