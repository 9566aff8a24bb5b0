"""``mmseg-imbalance demo``: the main job from counting to comparing, on generated data."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from mmseg_imbalance.commands.options import command_parser, need_mmsegmentation, read_config
from mmseg_imbalance.shipped import configs, tools

DESCRIPTION = """\
The main job on generated data: make street scenes, count their classes, train
a small pretrained network with and without class balancing, test both on
images that were not trained on, compare them class by class. Takes a few
minutes on a CPU. Writes everything into one folder: data, logs, checkpoints,
charts, results."""
RUNS = {
    'cross-entropy': 'segformer_efficientnet-lite0_1xb4-200i_longtail-cityscapes-256x128',
    'combined, auto': 'segformer_efficientnet-lite0-combined_1xb4-200i_longtail-cityscapes-256x128',
}
CHECKPOINT = 'iter_200.pth'
MEANS = ('mIoU', 'mIoU.head', 'mIoU.body', 'mIoU.tail')
READING = """\
Tail: the third of the classes with the fewest pixels in training, here 6 of 19, each with less than 0.4 %.
IoU is of 40 images that were not trained on. One seed and short training: in a long one, cross-entropy learns
rare classes too. What is left of the difference then is in docs/what-helps.md."""


class Demo:
    """The steps, which write into one folder."""

    def __init__(self, folder: Path, seed: int = 0) -> None:
        self.folder, self.seed, self.log = folder, seed, folder / 'log.txt'
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

    def config(self, name: str) -> Path:
        """The config with the folder of the data in it; a command line takes no path with a space."""
        cfg = read_config(str(configs() / 'experiments' / f'{name}.py'), [f'randomness.seed={self.seed}'])
        for split in ('train', 'val', 'test'):
            cfg[f'{split}_dataloader'].dataset.data_root = str(self.data)
        path = self.folder / 'configs' / f'{name}.py'
        path.parent.mkdir(exist_ok=True)
        cfg.dump(path)
        return path

    def train_and_test(self, config: str) -> None:
        """One run, with its test in a folder below it."""
        work_dir, path = self.folder / config, self.config(config)
        self.run('train.py', path, '--work-dir', work_dir)
        test = [work_dir / CHECKPOINT, '--work-dir', work_dir / 'test', '--save-predictions']
        self.run('test.py', path, *test)

    def compare(self) -> str:
        """The comparison, and its means in one line."""
        out = self.folder / 'comparison'
        self.show('compare', *(self.folder / config for config in RUNS.values()), '--out', out)
        configs = json.loads((out / 'comparison.json').read_text())['configs']
        before, after = (config['estimates'] for config in configs)
        return ', '.join(
            f'{key.removeprefix("mIoU.")} {before[key]["mean"]:.1f} to {after[key]["mean"]:.1f}'
            for key in MEANS
        )


def main(argv: list[str] | None = None) -> int:
    options = command_parser('demo', DESCRIPTION, '--out demo')
    options.add_argument('--out', type=Path, default=Path('demo'), metavar='DIR', help='default %(default)s')
    options.add_argument('--seed', type=int, default=0, help='of the trainings; default %(default)s')
    args = options.parse_args(argv)
    folder = args.out
    need_mmsegmentation()
    from rich.console import Console

    from mmseg_imbalance.backbones import imagenet_weights

    imagenet_weights()  # where they are not installed, say so before the work
    console, demo = Console(), Demo(folder, args.seed)
    folder.mkdir(parents=True, exist_ok=True)
    demo.log.unlink(missing_ok=True)
    demo.show('make-scenes', demo.data, '--train', 120, '--val', 40, '--size', '256x128')
    weights, chart = folder / 'class_weights.json', folder / 'class_weights.png'
    files = ['--out', weights, '--plot', chart, '--cache-dir', folder / 'cache']
    demo.show('class-weights', demo.config(RUNS['combined, auto']), *files)

    for name, config in RUNS.items():
        with console.status(f'{name}: training, then testing'):
            demo.train_and_test(config)

    means = demo.compare()
    print(READING)
    for path, what in (
        (demo.data, 'the generated data'),
        (chart, 'class statistics and weights'),
        (folder / 'comparison' / 'comparison.html', 'the comparison with its plots and pictures'),
        *((folder / config, f'logs, checkpoints and results of {name}') for name, config in RUNS.items()),
        (demo.log, 'what the commands printed'),
    ):
        print(f'{path}: {what}')
    print(f'IoU in per cent, from {" to ".join(f"({name})" for name in RUNS)}: {means}')
    return 0
