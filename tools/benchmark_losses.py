"""Time and memory of the losses, forward and backward, beside plain cross-entropy in the same run.

A round runs every row once, in turn, so that a busy machine slows all of them alike; the time ratio is the
median over the rounds. Value and gradient of each row are first compared with plain PyTorch in double: a row
that is off by more than 1e-4 gets no time, and the exit status is 1. Memory is the peak of what all threads
allocate beyond the inputs, the gradient of the logits included.
"""

import argparse
import ctypes
import gc
import json
import re
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path

import torch
import torch.nn.functional as F
from rich import box
from rich.table import Table

from mmseg_imbalance.losses import CombinedWeightedLoss
from mmseg_imbalance.ops.soft_stats import BACKENDS
from mmseg_imbalance.visualization import table_text

IGNORED = 255
TOLERANCE = 1e-4


def make_batch(args, scale):
    """Logits (B, C, h, w) that are mostly right, and labels (B, H, W) in blocks."""
    torch.manual_seed(0)
    height, width = args.size
    blocks = torch.randint(args.classes, (args.batch, 1, max(1, height // 16), max(1, width // 16)))
    blocks = torch.where(torch.rand(blocks.shape) < args.ignored, IGNORED, blocks).float()
    target = F.interpolate(blocks, args.size)[:, 0].long()
    seen = F.interpolate(blocks, (round(height / scale), round(width / scale)))
    logits = 2 * torch.randn(args.batch, args.classes, *seen.shape[2:])
    logits += 5 * (seen == torch.arange(args.classes)[:, None, None])
    return logits.requires_grad_(), target


def cross_entropy(logits, target, weight):
    if logits.shape[2:] != target.shape[1:]:
        logits = F.interpolate(logits, target.shape[1:], mode='bilinear', align_corners=False)
    return F.cross_entropy(logits, target, weight.to(logits), ignore_index=IGNORED)


def cross_entropy_and_dice(logits, target, weight):
    """The formula of CombinedWeightedLoss as one would write it down."""
    if logits.shape[2:] != target.shape[1:]:
        logits = F.interpolate(logits, target.shape[1:], mode='bilinear', align_corners=False)
    weight = weight.to(logits)
    valid = target[:, None] != IGNORED
    # scattered, since F.one_hot makes a tensor of int64, twice the size, on the way
    truth = torch.zeros_like(logits).scatter_(1, torch.where(valid, target[:, None], 0), valid.to(logits))
    p = logits.softmax(1) * valid
    dice = (2 * (p * truth).sum((2, 3)) + 1) / (p.sum((2, 3)) + truth.sum((2, 3)) + 1)
    return 0.6 * cross_entropy(logits, target, weight) + 0.4 * ((1 - dice) @ weight / weight.sum()).mean()


@dataclass(eq=False)
class Row:
    name: str
    logits: torch.Tensor
    target: torch.Tensor
    loss: Callable  # of (logits, target)
    plain: Callable  # the same in plain PyTorch
    baseline: 'Row | None' = None  # None: itself
    seconds: list[float] = field(default_factory=list)  # by round
    off_by: float = 0.0
    peak: int | None = None  # bytes

    def compare(self):
        """Difference from double, relative to the value and to the largest gradient; the larger one."""
        results = []
        for loss, dtype in ((self.plain, torch.float64), (self.loss, self.logits.dtype)):
            leaf = self.logits.detach().to(dtype).requires_grad_()
            value = loss(leaf, self.target)
            results.append((value.detach(), *torch.autograd.grad(value, leaf)))
        self.off_by = max(((b - a).abs().max() / a.abs().max()).item() for a, b in zip(*results, strict=True))

    def time(self):
        start = time.perf_counter()
        self.loss(self.logits, self.target).backward()
        self.seconds.append(time.perf_counter() - start)
        self.logits.grad = None

    def measure_memory(self):
        # PyTorch's profiler does not see the threads of a Python pool; the peak of resident memory does
        if sys.platform != 'linux':
            return
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        before = _memory('VmRSS')
        Path('/proc/self/clear_refs').write_text('5')  # resets VmHWM
        self.loss(self.logits, self.target).backward()
        # threads overlap differently from one call to the next
        self.peak = max(self.peak or 0, _memory('VmHWM') - before)
        self.logits.grad = None

    def record(self):
        base = self.baseline or self
        right = self.off_by <= TOLERANCE  # False for NaN
        ratios = [mine / its for mine, its in zip(self.seconds, base.seconds, strict=True)]
        return {
            'logits': 'x'.join(map(str, self.logits.shape[2:])),
            'loss': self.name,
            'median_ms': 1e3 * statistics.median(self.seconds) if right else None,
            'min_ms': 1e3 * min(self.seconds) if right else None,
            'time_ratio': statistics.median(ratios) if right else None,
            'peak_MB': self.peak and self.peak / 1e6,
            'memory_ratio': self.peak and self.peak / base.peak,
            'off_by': self.off_by,
        }


def _memory(key):
    return 1024 * int(re.search(rf'{key}:\s+(\d+) kB', Path('/proc/self/status').read_text())[1])


def make_rows(args):
    weight = torch.linspace(0.2, 3, args.classes)
    ce, ce_dice = (partial(loss, weight=weight) for loss in (cross_entropy, cross_entropy_and_dice))
    rows = []
    for scale in args.scale:
        batch = make_batch(args, scale)
        prefix = '' if scale == 1 else 'resize + '
        baseline = Row(f'{prefix}F.cross_entropy', *batch, ce, ce)
        rows += [baseline, Row(f'{prefix}CE + Dice', *batch, ce_dice, ce_dice, baseline)]
        for backend in args.backend:
            ours = CombinedWeightedLoss(class_weight=weight, backend=backend)
            rows.append(Row(f'ours, {backend}', *batch, ours, ce_dice, baseline))
    return rows


def make_table(records, title):
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for name in records[0]:
        table.add_column(name.replace('_', '\n'), justify='left' if name in ('logits', 'loss') else 'right')
    forms = dict(logits='', loss='', time_ratio='.2f', memory_ratio='.2f', off_by='.0e')
    for _, group in groupby(records, lambda record: record['logits']):
        for record in group:
            cells = record.items()
            table.add_row(*('-' if v is None else format(v, forms.get(name, '.0f')) for name, v in cells))
        table.add_section()
    return table


def size(text):
    height, width = map(int, text.split('x'))
    return height, width


def main(argv=None):
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument('--size', type=size, default=(512, 1024), metavar='HxW', help='of the labels')
    options.add_argument('--classes', type=int, default=19)
    options.add_argument('--batch', type=int, default=2)
    options.add_argument('--scale', type=float, nargs='+', default=[8, 4, 1], help='label size / logit size')
    options.add_argument('--ignored', type=float, default=0.1, help='share of the pixels')
    options.add_argument('--rounds', type=int, default=10, help='after one to warm up')
    options.add_argument('--backend', nargs='+', choices=BACKENDS, default=['strips'])
    options.add_argument('--json', help='file to write')
    args = options.parse_args(argv)

    rows = make_rows(args)
    for row in rows:
        row.compare()
    for _ in range(1 + args.rounds):
        for row in rows:
            row.time()
    for row in rows:
        del row.seconds[0]
    if sys.platform == 'linux':
        # M_MMAP_THRESHOLD: the C allocator gives large blocks back at once, so what is resident is allocated
        ctypes.CDLL(None).mallopt(-3, 1 << 16)
    for _ in range(3):
        for row in rows:
            row.measure_memory()

    records = [row.record() for row in rows]
    batch = 'x'.join(map(str, (args.batch, args.classes, *args.size)))
    title = f'{batch}, torch {torch.__version__}, {torch.get_num_threads()} CPU threads'
    print(table_text(make_table(records, title)))
    if args.json:
        Path(args.json).write_text(json.dumps(dict(title=title, options=vars(args), rows=records), indent=2))
    sys.exit(any(record['time_ratio'] is None for record in records))


if __name__ == '__main__':
    main()
