"""Time, memory and error of the losses, forward and backward, beside plain cross-entropy in the same run.

A round runs every row of a case once, in turn, so that a busy machine slows all of them alike; the time ratio
is the median over the rounds. Value and gradient of each row are first compared with its formula in plain
PyTorch in double: a row that is off gets no speed, and if it is one of this package's the exit status is 1.
Memory is the peak of what is allocated beyond the inputs, the gradient of the logits included; of a training
step, beyond the model and the optimizer's state. On CUDA, bandwidth is the least that full-size logits make
forward and backward move, as a share of what a large copy reaches.

What is not installed is skipped; pip install 'mmseg-imbalance[benchmark]' brings the other libraries.
"""

import argparse
import ctypes
import gc
import json
import platform
import re
import statistics
import sys
import time
from functools import partial
from itertools import groupby, product
from pathlib import Path

import torch
from benchmark_rows import IGNORED, STEPS, loss_case, similarity_case, step_case, subclass_case
from matplotlib.figure import Figure
from rich import box
from rich.markup import escape
from rich.table import Table

from mmseg_imbalance.ops.soft_stats import BACKENDS
from mmseg_imbalance.tables import table_text

CALLS = 5  # of a round on CUDA, queued back to back as they are in training
FORMATS = dict(ms='.3g', time_ratio='.2f', MB='.3g', memory_ratio='.2f', bandwidth='.0%', off_by='.0e')


def check(row, tolerance):
    """Largest difference from the formula, relative to the value and to the largest gradient."""
    try:
        row.trial = row.make_trial()
        truth = row.truth or row.trial.truth
        pairs = zip(truth(), row.trial.result(), strict=True)
        row.off_by = max(((b - a).abs().max() / a.abs().max()).nan_to_num(torch.inf).item() for a, b in pairs)
    except Exception as error:
        # a backend of this package may say that it cannot run here, but not crash
        if row.ours and not isinstance(error, RuntimeError):
            raise
        # the first line of a compiler's error does not say which
        row.skipped = ' '.join(f'{type(error).__name__}: {error}'.split('\n')[:2])
    else:
        row.right = row.off_by <= tolerance


def seconds(run, device):
    if device == 'cpu':
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(CALLS):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / CALLS


def extra_memory(run, device):
    """Bytes, None where nobody counts them."""
    gc.collect(1)  # of what the last run made; a full collection takes longer than a small loss
    if device == 'cuda':
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    # PyTorch's profiler does not see the threads of a Python pool; the peak of resident memory does
    if sys.platform != 'linux':
        return None
    ctypes.CDLL(None).malloc_trim(0)
    before = _memory('VmRSS')
    Path('/proc/self/clear_refs').write_text('5')  # resets VmHWM
    run()
    return _memory('VmHWM') - before


def _memory(key):
    return 1024 * int(re.search(rf'{key}:\s+(\d+) kB', Path('/proc/self/status').read_text())[1])


def keep_freed_blocks(keep):
    """Let the C allocator hold what is freed, as it comes to do by itself, or give back even small blocks."""
    if sys.platform == 'linux':
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 32 << 20 if keep else 1 << 16)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 64 << 20 if keep else 1 << 16)  # M_TRIM_THRESHOLD


def examine(case, args):
    """Fill in what is right and what memory it takes; the trials are let go."""
    # a few roundings of the gradient's own dtype, or of sums over many pixels
    tolerance = max(1e-4, 4 * torch.finfo(getattr(torch, args.dtype)).eps)
    for row in case.rows:
        check(row, tolerance)
        row.truth = None  # the last one frees what they share
    for _ in range(3):  # threads overlap differently from one call to the next
        for row in case.rows:
            if not row.skipped:
                peak = extra_memory(row.trial.run, args.device)
                row.peak = peak and max(peak, row.peak or 0)
    for row in case.rows:
        row.make_trial = row.trial = None
    return case


def race(case, examined, args):
    """Fill the times of ``case``, made anew, into the rows of the examined one."""
    rows = [
        (row, new.make_trial()) for row, new in zip(examined.rows, case.rows, strict=True) if not row.skipped
    ]
    for i in range(1 + args.rounds):
        for row, trial in rows:
            elapsed = seconds(trial.run, args.device)
            if i:  # the first warms up
                row.seconds.append(elapsed)


def record(case, row, bandwidth):
    """The line of a row in the table."""
    base = case.rows[0]
    line = dict(batch=case.batch, logits=case.logits, loss=row.name, ours=row.ours)
    line |= dict.fromkeys(FORMATS) | dict(off_by=row.off_by, skipped=row.skipped, note=row.note)
    if row.peak:
        line |= dict(MB=row.peak / 1e6, memory_ratio=base.peak and row.peak / base.peak)
    if row.seconds and row.right:
        median = statistics.median(row.seconds)
        ratios = [mine / its for mine, its in zip(row.seconds, base.seconds, strict=False)]
        line |= dict(ms=1e3 * median, time_ratio=statistics.median(ratios) if ratios else None)
        line['bandwidth'] = bandwidth and case.least_bytes and case.least_bytes / median / bandwidth
    return line


def cells(record):
    """What is shown of a record, as text by column."""
    note = f'skipped: {record["skipped"]}' if record['skipped'] else record['note']
    if record['ms'] is None and not record['skipped']:
        note = f'off, so no speed. {note}'
    text = {
        name: '-' if record[name] is None else format(record[name], form) for name, form in FORMATS.items()
    }
    return dict(batch=record['batch'], logits=record['logits'], loss=record['loss'], **text, note=note)


def show(lines, title):
    """The table of a terminal."""
    table = Table(title=escape(title), box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for name in lines[0]:
        table.add_column(name.replace('_', '\n'), justify='right' if name in FORMATS else 'left')
    for _, group in groupby(lines, lambda line: (line['batch'], line['logits'])):
        for line in group:
            table.add_row(*map(escape, line.values()))
        table.add_section()
    return table_text(table)


def markdown(lines, title):
    """The same for GitHub."""
    names = lines[0]
    rows = [[name.replace('_', ' ') for name in names]]
    rows += [['--:' if name in FORMATS else '---' for name in names], *(line.values() for line in lines)]
    return '\n'.join([title, '', *(f'| {" | ".join(row)} |' for row in rows), ''])


def plot(records, title, path):
    """Bars of the time and memory ratio, one pair of panels for each batch and size of the logits."""
    records = [record for record in records if not record['skipped']]
    groups = [list(group) for _, group in groupby(records, lambda r: f'{r["batch"]}, logits {r["logits"]}')]
    rows = [len(group) for group in groups]
    figure = Figure(figsize=(11, 1 + sum(0.5 + 0.27 * n for n in rows)), layout='constrained')
    panels = figure.subplots(len(groups), 2, squeeze=False, sharey='row', height_ratios=rows)
    for group, pair in zip(groups, panels, strict=True):
        for axes, key in zip(pair, ('time_ratio', 'memory_ratio'), strict=True):
            bars(axes, group, key)
        pair[0].set_title(f'{group[0]["batch"]}, logits {group[0]["logits"]}', loc='left', fontsize=10)
        pair[0].invert_yaxis()
    for axes, label in zip(panels[-1], ('time', 'extra memory'), strict=True):
        axes.set_xlabel(f'{label} / that of the first row')
    figure.suptitle(title, fontsize=10)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def bars(axes, group, key):
    values = [record[key] or 0 for record in group]
    colors = ['#d1783c' if record['ours'] else '#4878a8' for record in group]
    drawn = axes.barh([record['loss'] for record in group], values, color=colors)
    axes.bar_label(drawn, [f'{value:.2f}' if value else 'none' for value in values], padding=3, fontsize=8)
    axes.axvline(1, color='0.4', linewidth=0.8, linestyle=':')
    axes.set_xlim(0, 1.15 * max(1, *values))
    axes.spines[['top', 'right']].set_visible(False)


def copy_bandwidth():
    """Bytes per second of a large copy on the GPU, read and written."""
    source = torch.empty(1 << 28, dtype=torch.uint8, device='cuda')
    copy = torch.empty_like(source)
    return 2 * source.nbytes / min(seconds(lambda: copy.copy_(source), 'cuda') for _ in range(5))


def machine(device, bandwidth):
    """What the numbers were taken on."""
    if device == 'cuda':
        return f'torch {torch.__version__}, {torch.cuda.get_device_name()}, copies {bandwidth / 1e9:.0f} GB/s'
    info = Path('/proc/cpuinfo')
    model = re.search(r'model name\s*: (.+)', info.read_text() if info.exists() else '')
    cpu = model[1] if model else platform.processor() or platform.machine()
    return f'torch {torch.__version__}, {cpu}, {torch.get_num_threads()} threads'


def size(text):
    height, width = map(int, text.split('x'))
    return height, width


def parse(argv):
    options = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = options.add_argument
    add('--device', choices=['cpu', 'cuda'], default='cuda' if torch.cuda.is_available() else 'cpu')
    add('--size', type=size, nargs='+', default=[(512, 1024)], metavar='HxW', help='of the labels')
    add('--classes', type=int, nargs='+', default=[19])
    add('--batch', type=int, nargs='+', default=[2])
    add(
        '--scale', type=float, nargs='*', default=[8, 4, 1], help='label size / logit size; none: only --step'
    )
    add('--dtype', choices=['float32', 'float16', 'bfloat16'], default='float32', help='of the logits')
    add('--ignored', type=float, default=0.1, help='share of the pixels')
    add('--rounds', type=int, default=7, help='after one to warm up')
    add('--backend', nargs='+', choices=BACKENDS, default=list(BACKENDS))
    add(
        '--competitors', action=argparse.BooleanOptionalAction, default=True, help='losses of other libraries'
    )
    add('--subclass', action='store_true', help='the subclassified loss too')
    add('--step', nargs='+', choices=STEPS, default=[], help='whole training steps too')
    add('--step-size', type=size, metavar='HxW', help='of their images; default: the crops of their configs')
    for form in ('json', 'markdown', 'plot'):
        add(f'--{form}', metavar='FILE', help='to write')
    args = options.parse_args(argv)
    if max(args.classes) > IGNORED:
        options.error(f'--classes: at most {IGNORED}, the label of ignored pixels')
    if args.step and args.device == 'cpu' and args.dtype == 'float16':
        options.error('--step on CPU: float32 or bfloat16')
    return args


def main(argv=None):
    args = parse(argv)
    bandwidth = copy_bandwidth() if args.device == 'cuda' else None
    shapes = [
        ((batch, *size), classes, scale)
        for size, classes, batch, scale in product(args.size, args.classes, args.batch, args.scale)
    ]
    cases = [partial(loss_case, *shape) for shape in shapes]
    if args.subclass:
        # no head has features of label size
        cases += [partial(subclass_case, *shape) for shape in shapes if shape[2] > 1]
        cases += [partial(similarity_case, *shape) for shape in shapes]
    cases += [partial(step_case, name) for name in args.step]
    # memory first: once the allocator has come to hold blocks, what is resident is not what is allocated
    keep_freed_blocks(False)
    examined = [examine(case(args), args) for case in cases]
    keep_freed_blocks(True)
    for make, case in zip(cases, examined, strict=True):
        race(make(args), case, args)
    records = [record(case, row, bandwidth) for case in examined for row in case.rows]
    title = f'{machine(args.device, bandwidth)}, {args.dtype}'
    lines = [cells(record) for record in records]
    if bandwidth is None:
        for line in lines:
            del line['bandwidth']
    print(show(lines, title))
    if args.json:
        Path(args.json).write_text(json.dumps(dict(title=title, options=vars(args), rows=records), indent=2))
    if args.markdown:
        Path(args.markdown).write_text(markdown(lines, title))
    if args.plot:
        plot(records, title, args.plot)
    sys.exit(any(record['ours'] and not record['skipped'] and record['ms'] is None for record in records))


if __name__ == '__main__':
    main()
