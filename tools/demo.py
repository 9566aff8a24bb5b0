"""The main job on generated data: count classes, train with and without balancing, compare the classes.

Writes everything below demo/: data, logs, checkpoints, charts, results.
"""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

TOOLS = Path(__file__).parent
CONFIGS = TOOLS.parent / 'configs' / 'segformer'
DEMO = Path('demo')
RUNS = {
    'cross-entropy': 'segformer_mit-b0-small_1xb8-2k_longtail-cityscapes-256x128',
    'combined, auto': 'segformer_mit-b0-small-combined_1xb8-2k_longtail-cityscapes-256x128',
}
ITERATIONS = 400
RARE_SHARE = 0.01  # of the valid training pixels


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
    """IoU of each class in per cent on the val split, and the seconds that training took."""
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
    start = time.monotonic()
    run('train.py', CONFIGS / f'{config}.py', '--work-dir', work_dir, *options)
    seconds = time.monotonic() - start
    checkpoint = work_dir / f'iter_{ITERATIONS}.pth'
    run('test.py', CONFIGS / f'{config}.py', checkpoint, '--work-dir', work_dir / 'test', *options)
    results = max((work_dir / 'test').glob('*/*.json'), key=lambda path: path.stat().st_mtime)
    return json.loads(results.read_text()), seconds


def plot(classes, results, path):
    """Bars of the IoU of each class, a colour for each run, rarest class last."""
    figure = Figure(figsize=(9, 7), layout='constrained')
    axes = figure.subplots()
    height = 0.8 / len(results)
    for offset, (name, metrics) in enumerate(results.items()):
        values = [metrics.get(f'IoU.{c}', np.nan) for c in classes]
        axes.barh(np.arange(len(classes)) + offset * height, values, height, label=name)
    axes.set_yticks(np.arange(len(classes)) + 0.4 - height / 2, classes)
    axes.invert_yaxis()
    axes.set_xlabel('IoU on the val split (%)')
    axes.spines[['top', 'right']].set_visible(False)
    axes.legend()
    figure.savefig(path, dpi=120)


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

    results, seconds = {}, {}
    for name, config in RUNS.items():
        with console.status(f'{name}: training {ITERATIONS} iterations, then testing'):
            results[name], seconds[name] = train_and_test(config, data)
        console.print(f'{name}: {ITERATIONS} iterations in {seconds[name]:.0f} s')

    record = json.loads(weights.read_text())
    share = np.array(record['pixels']) / sum(record['pixels'])
    order = np.argsort(-share)
    table = Table(title='IoU on the val split, in per cent')
    for column in ('class', 'share', *results):
        table.add_column(column, justify='left' if column == 'class' else 'right')
    for c in order:
        name = record['classes'][c]
        ious = [f'{metrics.get(f"IoU.{name}", float("nan")):.2f}' for metrics in results.values()]
        table.add_row(name, f'{share[c]:.2%}', *ious, end_section=c == order[-1])
    rare = [record['classes'][c] for c in order if share[c] < RARE_SHARE]
    means = {
        'mean over all': list(record['classes']),
        f'mean over the {len(rare)} rare (below {RARE_SHARE:.0%})': rare,
    }
    for label, names in means.items():
        mean = [np.nanmean([m.get(f'IoU.{n}', np.nan) for n in names]) for m in results.values()]
        table.add_row(label, '', *(f'{value:.2f}' for value in mean), style='bold')
    console.print(table)
    console.print('One seed on a small generated set; it shows the workings, not what your data will give.')

    plot([record['classes'][c] for c in order], results, DEMO / 'iou.png')
    for path, what in (
        (data, 'the generated data'),
        (chart, 'class statistics and weights'),
        (DEMO / 'iou.png', 'IoU by class'),
        *((DEMO / config, f'logs, checkpoints and results of {name}') for name, config in RUNS.items()),
        (DEMO / 'log.txt', 'what the commands printed'),
    ):
        print(f'{path}: {what}')


if __name__ == '__main__':
    main()
