"""``mmseg-imbalance class-weights``: class weights from the counted classes of a config's training data."""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

from mmseg_imbalance.class_weight import WeightRecord
from mmseg_imbalance.commands.options import add_cfg_options, command_parser, read_config
from mmseg_imbalance.counting import training_frequency
from mmseg_imbalance.tables import class_table, table_text
from mmseg_imbalance.weighting import SCHEMES, class_weights

DESCRIPTION = """\
Count the classes of a config's training data set and print, for each class,
its share of the pixels and the weight that each scheme gives it. Annotations
alone are read, not the images; counts are cached. --out writes the weights for
class_weight='FILE' of a loss. class_weight='auto' with ClassWeightHook does
the same counting when training starts, without this command."""
EXAMPLE = """\
CONFIG
CONFIG --scheme effective_num --out class_weights.json --plot classes.png"""


def _chart(text: str) -> str:
    """The path of a chart in a format that can be written."""
    if Path(text).suffix not in ('.png', '.svg', '.pdf'):
        raise argparse.ArgumentTypeError(f'{text!r} does not end with .png, .svg or .pdf')
    return text


def _options() -> argparse.ArgumentParser:
    options = command_parser('class-weights', DESCRIPTION, EXAMPLE)
    add = options.add_argument
    add('config', metavar='CONFIG', help='config file, as for training')
    add('--scheme', choices=SCHEMES, default='sqrt_inv_freq', help='of --out and --plot; default %(default)s')
    add('--out', metavar='FILE', help='JSON file to write')
    add('--plot', type=_chart, metavar='FILE', help='chart to write: .png, .svg or .pdf')
    add('--max-images', type=int, metavar='N', help='count a random sample of N images; default: all')
    add('--workers', type=int, default=2, metavar='N', help='worker processes; default %(default)s')
    add(
        '--cache-dir',
        metavar='DIR',
        help='folder of the counts; default: $MMSEG_IMBALANCE_CACHE, else ~/.cache/mmseg_imbalance',
    )
    add_cfg_options(options)
    return options


def main(argv: list[str] | None = None) -> int:
    options = _options()
    args = options.parse_args(argv)
    try:
        frequency = training_frequency(
            read_config(args.config, args.cfg_options),
            max_images=args.max_images,
            num_workers=args.workers,
            cache_dir=args.cache_dir,
        )
    except (ValueError, OSError, RuntimeError) as error:
        options.exit(1, f'{options.prog}: {error}\n')
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        weights = {scheme: class_weights(frequency, scheme) for scheme in SCHEMES}
    # a table of this width is better scrolled than squeezed
    print(table_text(class_table(frequency, weights)))
    for message in sorted({str(warning.message) for warning in caught}):
        print(f'warning: {message}')
    try:
        if args.out:
            chosen = weights[args.scheme]
            WeightRecord.count(frequency, chosen, args.scheme, max_images=args.max_images).save(args.out)
            print(f'{args.scheme} weights: {args.out}')
        if args.plot:
            from mmseg_imbalance.plots import plot_class_weights

            plot_class_weights(frequency, weights[args.scheme], args.plot, label=f'{args.scheme} weight')
            print(f'chart: {args.plot}')
    except OSError as error:  # a full disk, a folder that cannot be written
        options.exit(1, f'{options.prog}: {error}\n')
    return 0
