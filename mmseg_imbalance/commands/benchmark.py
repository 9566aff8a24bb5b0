"""``mmseg-imbalance benchmark``: time, memory and error of the losses beside plain cross-entropy."""

import argparse
import json
from collections.abc import Callable
from functools import partial
from itertools import product
from tempfile import TemporaryDirectory

import torch

from mmseg_imbalance.benchmark.case import IGNORED
from mmseg_imbalance.commands.options import command_parser, need_mmsegmentation
from mmseg_imbalance.files import write_atomically
from mmseg_imbalance.ops.soft_stats import BACKENDS

DESCRIPTION = """\
Time, memory and error of the losses, forward and backward, beside plain
cross-entropy in the same run.

A round runs every row of a case once, in turn, so that a busy machine slows
all of them alike; the time ratio is the median over the rounds. Value and
gradient of each row are first compared with its formula in plain PyTorch in
double: a row that is off gets no speed, and if it is one of this package's the
exit status is 1. Memory is the peak of what is allocated beyond the inputs,
the gradient of the logits included; of a training step, beyond the model and
the optimizer's state. On CUDA, ms are what the device works at calls that were
queued before, as in a training whose device is busy; of runs too long for the
queue, as training steps, the time from one to the next. Host ms are what the
CPU takes to queue a run; where the device waits for it, a run takes as long.
GB/s are the bytes that forward and backward have to move at least, logits and
labels read twice and the gradient written once; bandwidth is their share of
what a large copy moves in that time. Gexp/s are the exponentials of two
softmaxes at label size.

--counting writes label files into a temporary folder, of street scenes and of
random labels. Each run decodes all of them, with Pillow as MMSegmentation does,
or counts their classes from the start, by as many worker processes; the time
is per file.

--registers measures nothing: it compiles the Triton kernels, which needs no
GPU, and shows what a thread and a program take of one. Stack is what registers
do not hold; programs is how many a multiprocessor holds at once; bytes are
those of logits, gradient and label that a pixel costs at least, by the type
of the label.

What is not installed is skipped; pip install 'mmseg-imbalance[benchmark]'
brings the other libraries."""
EXAMPLE = """\
--rounds 9 --markdown table.md --plot table.png
--scale --step segformer deeplabv3
--scale --suite configs/experiments/suite.py
--counting
--registers --classes 19 --scale 8 1"""
DTYPES = ('float32', 'float16', 'bfloat16')
CAPABILITIES = (80, 86, 89, 90, 100, 120)  # of GPUs, 90 for 9.0
STEPS = ('segformer', 'deeplabv3')


def _size(text: str) -> tuple[int, int]:
    height, _, width = text.partition('x')
    if not (height.isdecimal() and width.isdecimal()):
        raise argparse.ArgumentTypeError(f'{text!r} is not HEIGHTxWIDTH, for instance 512x1024')
    return int(height), int(width)


def parse(argv: list[str] | None) -> argparse.Namespace:
    options = command_parser('benchmark', DESCRIPTION, EXAMPLE)
    add = options.add_argument
    add(
        '--device',
        choices=['cpu', 'cuda'],
        default='cuda' if torch.cuda.is_available() else 'cpu',
        help='default: cuda where there is one',
    )
    add(
        '--size',
        type=_size,
        nargs='+',
        metavar='HxW',
        help='of the labels in pixels; default 512x1024, of --counting 1024x2048',
    )
    add('--classes', type=int, nargs='+', metavar='N', help='default 19; with --registers 19 and 150')
    add('--batch', type=int, nargs='+', default=[2], metavar='N', help='images; default 2')
    add(
        '--scale',
        type=float,
        nargs='*',
        default=[8, 4, 1],
        metavar='X',
        help='label size / logit size; default 8 4 1; nothing after it: only --step and --suite',
    )
    add(
        '--dtype',
        choices=DTYPES,
        help='of the logits; default float32, with --registers all three',
    )
    add(
        '--ignored',
        type=float,
        default=0.1,
        metavar='X',
        help='share of the pixels, 0 to 1; default %(default)s',
    )
    add('--rounds', type=int, default=7, metavar='N', help='after one to warm up; default %(default)s')
    add('--backend', nargs='+', choices=BACKENDS, default=list(BACKENDS), help='default: all of them')
    add(
        '--competitors',
        action=argparse.BooleanOptionalAction,
        default=True,
        help='losses of other libraries; default: yes',
    )
    add(
        '--losses',
        action=argparse.BooleanOptionalAction,
        default=True,
        help='the losses and their competitors; --no-losses: only what the options below add',
    )
    add('--recall', action='store_true', help='the losses that look at recall too')
    add('--subclass', action='store_true', help='the subclassified losses too')
    add('--step', nargs='+', choices=STEPS, default=[], help='whole training steps of these models too')
    add('--suite', metavar='FILE', help='training steps of the methods of a suite file too')
    add(
        '--registers',
        type=int,
        nargs='*',
        choices=CAPABILITIES,
        metavar='CAPABILITY',
        help='what the Triton kernels take of GPUs; default 80 90 100',
    )
    add('--step-size', type=_size, metavar='HxW', help='of their images; default: the crops of their configs')
    add(
        '--bandwidth',
        action=argparse.BooleanOptionalAction,
        help='bytes and exponentials per second; default: on CUDA',
    )
    add('--counting', action='store_true', help='counting label files beside decoding them, nothing else')
    add('--images', type=int, default=64, metavar='N', help='files of --counting; default %(default)s')
    add(
        '--workers',
        type=int,
        nargs='+',
        default=[1, 2],
        metavar='N',
        help='processes of --counting, 0: this one; default 1 2',
    )
    for form, what in (
        ('json', 'all numbers'),
        ('markdown', 'the table'),
        ('plot', 'bars, .png, .svg or .pdf'),
    ):
        add(f'--{form}', metavar='FILE', help=f'file to write: {what}')
    args = options.parse_args(argv)
    args.size = args.size or [(1024, 2048) if args.counting else (512, 1024)]
    if args.counting:
        args.device = 'cpu'
    if args.bandwidth is None:
        args.bandwidth = args.device == 'cuda'
    args.dtypes = [args.dtype] if args.dtype else DTYPES
    args.dtype = args.dtype or DTYPES[0]
    args.classes = args.classes or ([19] if args.registers is None else [19, 150])
    if max(args.classes) > IGNORED:
        options.error(f'--classes: at most {IGNORED}, the label of ignored pixels')
    on_logits = args.scale and (args.losses or args.recall or args.subclass)
    if not (on_logits or args.step or args.suite or args.counting):
        options.error('nothing to measure: give --scale a number, or add --step, --suite or --counting')
    if args.step and args.device == 'cpu' and args.dtype == 'float16':
        options.error('--step on CPU: float32 or bfloat16')
    return args


def show_registers(args: argparse.Namespace) -> int:
    """The table of ``--registers``."""
    from mmseg_imbalance.benchmark.registers import NUMBERS, lines
    from mmseg_imbalance.benchmark.tables import markdown, show

    dtypes = [getattr(torch, name) for name in args.dtypes]
    rows = list(lines(args.registers or [80, 90, 100], args.classes, args.scale, dtypes))
    title = 'Triton kernels: registers and bytes of stack of a thread, bytes of shared memory of a program'
    print(show(rows, title, NUMBERS, ('gpu', 'classes', 'dtype')))
    write_files(args, dict(title=title, rows=rows), lambda: markdown(rows, title, NUMBERS))
    return 0


def write_files(args: argparse.Namespace, numbers: dict, text: Callable[[], str]) -> None:
    """Those that the options name."""
    for path, content in ((args.json, lambda: json.dumps(numbers, indent=2)), (args.markdown, text)):
        if path:
            with write_atomically(path) as file:
                file.write(content())


def find_cases(args: argparse.Namespace, folder: str) -> list[Callable]:
    """The cases that the options ask for, each made from them when it is its turn."""
    if args.counting or args.recall or args.step or args.subclass or args.suite:
        need_mmsegmentation()  # the losses have a core without it
    if args.counting:
        from mmseg_imbalance.benchmark.counting import counting_cases

        return counting_cases(folder, args)
    shapes = [
        ((batch, *size), classes, scale)
        for size, classes, batch, scale in product(args.size, args.classes, args.batch, args.scale)
    ]
    cases = []
    if args.losses:
        from mmseg_imbalance.benchmark.losses import loss_case

        cases += [partial(loss_case, *shape) for shape in shapes]
    if args.recall:
        from mmseg_imbalance.benchmark.recall import recall_case

        cases += [partial(recall_case, *shape) for shape in shapes]
    if args.subclass:
        from mmseg_imbalance.benchmark.subclasses import similarity_case, subclass_case

        # no head has features of label size
        cases += [partial(subclass_case, *shape) for shape in shapes if shape[2] > 1]
        cases += [partial(similarity_case, *shape) for shape in shapes]
    if args.step or args.suite:
        from mmseg_imbalance.benchmark.steps import step_case, suite_case

        cases += [partial(step_case, name) for name in args.step]
        cases += [partial(suite_case, args.suite)] if args.suite else []
    return cases


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    if args.registers is not None:
        return show_registers(args)
    from mmseg_imbalance.benchmark.measuring import copy_bandwidth, examine, keep_freed_blocks, machine, race
    from mmseg_imbalance.benchmark.tables import cells, markdown, plot, record, show, without_empty

    bandwidth = copy_bandwidth(args.device) if args.bandwidth else None
    with TemporaryDirectory() as folder:
        cases = find_cases(args, folder)
        # memory first: once the allocator has come to hold blocks, what is resident is not what is allocated
        keep_freed_blocks(False)
        examined = [examine(case(args), args) for case in cases]
        keep_freed_blocks(True)
        for make, case in zip(cases, examined, strict=True):
            race(make(args), case, args)
    records = [record(case, row, bandwidth) for case in examined for row in case.rows]
    title = f'{machine(args.device, bandwidth)}, {args.dtype}'
    lines = without_empty([cells(line) for line in records])
    print(show(lines, title))
    write_files(args, dict(title=title, options=vars(args), rows=records), lambda: markdown(lines, title))
    if args.plot:
        plot(records, title, args.plot)
    return int(any(line['ours'] and not line['skipped'] and line['ms'] is None for line in records))
