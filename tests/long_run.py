"""Train for long with every hook of this package on, and look at the memory and the time of an iteration.

    python tests/long_run.py --iterations 2000

prints what docs/faults.md states. tests/test_faults.py runs it for fewer iterations.
"""

import argparse
import ctypes
import gc
import os
import tempfile
import time
from pathlib import Path

import numpy as np
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner

from mmseg_imbalance.scenes.dataset import generate

CONFIG = 'configs/segformer/segformer_mit-b0-small-subclass3_1xb8-2k_longtail-cityscapes-256x128.py'
PAGE = os.sysconf('SC_PAGE_SIZE') / 2**20


class Watch(Hook):
    """CPU seconds of each iteration, and after every 100 the memory that is in use, in MB.

    What is free, but not given back, is left out: it depends on the order in which arrays come and go.
    """

    def __init__(self):
        self.memory, self.seconds = [], []

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        self.began = time.process_time()

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.seconds.append(time.process_time() - self.began)
        if (runner.iter + 1) % 100 == 0:
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)
            self.memory.append(int(Path('/proc/self/statm').read_text().split()[1]) * PAGE)


def train(folder, iterations):
    """Memory in MB after 100, 200, ... iterations, and CPU seconds of each iteration."""
    folder = Path(folder)
    generate(folder / 'scenes', train=12, val=2, size=(128, 64), workers=1)
    cfg = Config.fromfile(Path(__file__).parents[1] / CONFIG)
    for split in ('train', 'val', 'test'):
        loader = cfg[f'{split}_dataloader']
        loader.update(num_workers=0, persistent_workers=False)
        loader.dataset.data_root = str(folder / 'scenes')
        for step in loader.dataset.pipeline:
            if 'scale' in step:
                step.scale = (128, 64)
            if step['type'] == 'RandomCrop':
                step.update(type='RareClassCrop', crop_size=(64, 64), min_pixels=5)
    cfg.train_dataloader.batch_size = 2
    cfg.train_dataloader.pop('sampler')
    cache = str(folder / 'cache')
    cfg.train_dataloader.sampler = dict(type='RareClassSampler', min_pixels=10, cache_dir=cache)
    cfg.model.data_preprocessor.size = (64, 64)
    cfg.train_cfg.update(max_iters=iterations, val_interval=100)
    cfg.default_hooks.logger.interval = 10
    cfg.default_hooks.checkpoint.update(interval=200, max_keep_ckpts=1)
    cfg.custom_hooks = [
        dict(type='ClassWeightHook', num_workers=0, cache_dir=cache),
        dict(type='ClassBalanceHook', interval=10),
        dict(type='SubclassVisualizationHook', num_images=1),
        dict(type='EMAHook'),
    ]
    cfg.work_dir = str(folder / 'work_dir')
    cfg.randomness = dict(seed=0)
    runner = Runner.from_cfg(cfg)
    watch = Watch()
    runner.register_hook(watch, priority='VERY_LOW')
    runner.train()
    return np.array(watch.memory), np.array(watch.seconds)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--iterations', type=int, default=2000)
    with tempfile.TemporaryDirectory() as folder:
        memory, seconds = train(folder, parser.parse_args().iterations)
    print('iteration  memory (MB)  median CPU time of the 100 before (ms)')
    for number, megabytes in enumerate(memory, 1):
        median = np.median(seconds[100 * (number - 1) : 100 * number])
        print(f'{100 * number:9}  {megabytes:11.1f}  {1000 * median:38.1f}')
    print(f'memory after 200: {100 * (memory[1:].max() / memory[1] - 1):+.2f} % at most')


if __name__ == '__main__':
    main()
