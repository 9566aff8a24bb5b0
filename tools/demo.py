"""The main job on generated data: count classes, train with and without balancing, compare the classes.

Writes everything below demo/: data, logs, checkpoints, charts, results.
"""

import subprocess
import sys
from pathlib import Path

from rich.console import Console

TOOLS = Path(__file__).parent
CONFIGS = TOOLS.parent / 'configs' / 'segformer'
DEMO = Path('demo')
RUNS = {
    'cross-entropy': 'segformer_mit-b0-small_1xb8-2k_longtail-cityscapes-256x128',
    'combined, auto': 'segformer_mit-b0-small-combined_1xb8-2k_longtail-cityscapes-256x128',
}
ITERATIONS = 400


def show(script, *args):
    """One of the commands of this folder."""
    if subprocess.run([sys.executable, TOOLS / script, *map(str, args)]).returncode:
        sys.exit(f'{script} failed')


def run(script, *args):
    """The same with its output in demo/log.txt."""
    with open(DEMO / 'log.txt', 'a') as log:
        done = subprocess.run(
            [sys.executable, TOOLS / script, *map(str, args)], stdout=log, stderr=subprocess.STDOUT
        )
    if done.returncode:
        sys.exit(f'{script} failed; the end of {DEMO / "log.txt"} says why')


def train_and_test(config, data):
    """One run, with its test in a folder below it."""
    work_dir = DEMO / config
    options = [
        '--cfg-options',
        *(f'{split}_dataloader.dataset.data_root={data}' for split in ('train', 'val', 'test')),
        f'train_cfg.max_iters={ITERATIONS}',
        f'train_cfg.val_interval={ITERATIONS}',
        f'param_scheduler.1.end={ITERATIONS}',
        'train_dataloader.batch_size=4',
        'randomness.seed=0',
    ]
    run('train.py', CONFIGS / f'{config}.py', '--work-dir', work_dir, *options)
    checkpoint = work_dir / f'iter_{ITERATIONS}.pth'
    run('test.py', CONFIGS / f'{config}.py', checkpoint, '--work-dir', work_dir / 'test', *options)


def main():
    console = Console()
    DEMO.mkdir(exist_ok=True)
    (DEMO / 'log.txt').unlink(missing_ok=True)
    data = DEMO / 'data'
    size = ['--train', '120', '--val', '40', '--size', '256x128']
    show('make_longtail_cityscapes.py', data, *size)
    weights, chart = DEMO / 'class_weights.json', DEMO / 'class_weights.png'
    balanced = CONFIGS / f'{RUNS["combined, auto"]}.py'
    root = f'train_dataloader.dataset.data_root={data}'
    files = ['--out', weights, '--plot', chart, '--cache-dir', DEMO / 'cache']
    show('class_weights.py', balanced, *files, '--cfg-options', root)

    for name, config in RUNS.items():
        with console.status(f'{name}: training {ITERATIONS} iterations, then testing'):
            train_and_test(config, data)

    show('compare_runs.py', *(DEMO / config for config in RUNS.values()), '--out', DEMO / 'comparison')
    console.print('One seed on a small generated set; it shows the workings, not what your data will give.')
    for path, what in (
        (data, 'the generated data'),
        (chart, 'class statistics and weights'),
        (DEMO / 'comparison' / 'comparison.html', 'the comparison with its plots'),
        *((DEMO / config, f'logs, checkpoints and results of {name}') for name, config in RUNS.items()),
        (DEMO / 'log.txt', 'what the commands printed'),
    ):
        print(f'{path}: {what}')


if __name__ == '__main__':
    main()
