"""``mmseg-imbalance demo``: the main job from counting to comparing, on generated data."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from mmseg_imbalance.commands.options import command_parser, need_mmsegmentation
from mmseg_imbalance.shipped import configs, tools

DESCRIPTION = """\
The main job on generated data: make street scenes, count their classes, train
a small SegFormer with and without class balancing, test both, compare them
class by class. Takes a few minutes on a CPU. Writes everything into one
folder: data, logs, checkpoints, charts, results."""
RUNS = {
    'cross-entropy': 'segformer_mit-b0-small_1xb8-2k_longtail-cityscapes-256x128',
    'combined, auto': 'segformer_mit-b0-small-combined_1xb8-2k_longtail-cityscapes-256x128',
}
ITERATIONS = 400


class Demo:
    """The steps, which write into one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log = folder, folder / 'log.txt'
        self.data = folder / 'data'

    def show(self, name: str, *args: object) -> None:
        """One of the package's commands."""
        command = [sys.executable, '-m', 'mmseg_imbalance', name, *map(str, args)]
        if subprocess.run(command).returncode:
            sys.exit(f'mmseg-imbalance {name} failed')

    def run(self, script: str, *args: object) -> None:
        """Training or testing, with its output in the log."""
        with open(self.log, 'a') as log:
            command = [sys.executable, tools() / script, *map(str, args)]
            done = subprocess.run(command, stdout=log, stderr=subprocess.STDOUT)
        if done.returncode:
            sys.exit(f'{script} failed; the end of {self.log} says why')

    def train_and_test(self, config: str) -> None:
        """One run, with its test in a folder below it."""
        work_dir, path = self.folder / config, configs() / 'segformer' / f'{config}.py'
        options = [
            '--cfg-options',
            *(f'{split}_dataloader.dataset.data_root={self.data}' for split in ('train', 'val', 'test')),
            f'train_cfg.max_iters={ITERATIONS}',
            f'train_cfg.val_interval={ITERATIONS}',
            f'param_scheduler.1.end={ITERATIONS}',
            'train_dataloader.batch_size=4',
            'randomness.seed=0',
        ]
        self.run('train.py', path, '--work-dir', work_dir, *options)
        checkpoint = work_dir / f'iter_{ITERATIONS}.pth'
        self.run('test.py', path, checkpoint, '--work-dir', work_dir / 'test', *options)


def main(argv: list[str] | None = None) -> int:
    options = command_parser('demo', DESCRIPTION, '--out demo')
    options.add_argument('--out', type=Path, default=Path('demo'), metavar='DIR', help='default %(default)s')
    folder = options.parse_args(argv).out
    need_mmsegmentation()
    from rich.console import Console

    console, demo = Console(), Demo(folder)
    folder.mkdir(parents=True, exist_ok=True)
    demo.log.unlink(missing_ok=True)
    demo.show('make-scenes', demo.data, '--train', 120, '--val', 40, '--size', '256x128')
    weights, chart = folder / 'class_weights.json', folder / 'class_weights.png'
    balanced = configs() / 'segformer' / f'{RUNS["combined, auto"]}.py'
    root = f'train_dataloader.dataset.data_root={demo.data}'
    files = ['--out', weights, '--plot', chart, '--cache-dir', folder / 'cache']
    demo.show('class-weights', balanced, *files, '--cfg-options', root)

    for name, config in RUNS.items():
        with console.status(f'{name}: training {ITERATIONS} iterations, then testing'):
            demo.train_and_test(config)

    demo.show('compare', *(folder / config for config in RUNS.values()), '--out', folder / 'comparison')
    console.print('One seed on a small generated set; it shows the workings, not what your data will give.')
    for path, what in (
        (demo.data, 'the generated data'),
        (chart, 'class statistics and weights'),
        (folder / 'comparison' / 'comparison.html', 'the comparison with its plots'),
        *((folder / config, f'logs, checkpoints and results of {name}') for name, config in RUNS.items()),
        (demo.log, 'what the commands printed'),
    ):
        print(f'{path}: {what}')
    return 0
