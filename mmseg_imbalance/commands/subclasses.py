"""``mmseg-imbalance subclasses``: an HTML page of what a SubclassifiedLoss has found."""

from __future__ import annotations

import argparse
from pathlib import Path

from mmseg_imbalance.commands.options import add_cfg_options, command_parser, read_config

DESCRIPTION = """\
Write the subclasses of a trained model as one HTML page: for each class the
share, the mean loss and the weight of its subclasses, and where they lie in a
few validation images. The config needs a SubclassifiedLoss."""
EXAMPLE = """\
CONFIG work_dirs/run/iter_2000.pth
CONFIG work_dirs/run/iter_2000.pth --images 12 --out subclasses.html"""


def _options() -> argparse.ArgumentParser:
    options = command_parser('subclasses', DESCRIPTION, EXAMPLE)
    add = options.add_argument
    add('config', metavar='CONFIG', help='config file of the training')
    add('checkpoint', metavar='CHECKPOINT', help='checkpoint file (.pth)')
    add('--out', metavar='FILE', help='HTML file to write; default CHECKPOINT_subclasses.html beside it')
    add(
        '--images',
        type=int,
        default=6,
        metavar='N',
        help='spread evenly over the val split; default %(default)s',
    )
    add_cfg_options(options)
    return options


def main(argv: list[str] | None = None) -> int:
    options = _options()
    args = options.parse_args(argv)
    if args.images < 0:
        options.error(f'--images must be at least 0, got {args.images}')
    if args.config.endswith('.pth'):
        options.error(f'CONFIG comes first, then CHECKPOINT, got {args.config} and {args.checkpoint}')

    checkpoint = Path(args.checkpoint)
    out = Path(args.out) if args.out else checkpoint.with_name(f'{checkpoint.stem}_subclasses.html')
    try:
        cfg = read_config(args.config, args.cfg_options)
        from mmseg_imbalance.reports.subclass_page import write

        write(cfg, args.config, args.checkpoint, args.images, out)
    except (ValueError, OSError, RuntimeError) as error:
        options.exit(1, f'{options.prog}: {error}\n')
    print(f'report: {out}')
    return 0
