"""``mmseg-imbalance class-weights``: class weights from the counted classes of a config's training data."""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from mmseg_imbalance.class_weight import WeightRecord
from mmseg_imbalance.commands.options import add_cache_dir, add_cfg_options, command_parser, read_config
from mmseg_imbalance.counting import training_frequency
from mmseg_imbalance.counting.training import hook_of
from mmseg_imbalance.tables import class_table, source_table, table_text
from mmseg_imbalance.weighting import SCHEMES, class_weights

if TYPE_CHECKING:
    from mmengine.config import Config

    from mmseg_imbalance.hooks import ClassWeightHook

OF_HOOK = 'ClassWeightHook'  # the column of its weights
DESCRIPTION = """\
Count the classes of a config's training data set and print, for each class,
its share of the pixels and the weight that each scheme gives it; where the
ClassWeightHook of the config has options, such as power=0.5, also its weights.
Annotations alone are read, not the images; counts are cached. --out writes the
weights for class_weight='FILE' of a loss. class_weight='auto' with
ClassWeightHook does the same counting when training starts, without this
command."""
EXAMPLE = """\
CONFIG
CONFIG --scheme effective_num --out class_weights.json --plot classes.png"""


def _chart(text: str) -> str:
    """The path of a chart in a format that can be written."""
    if Path(text).suffix not in ('.png', '.svg', '.pdf'):
        raise argparse.ArgumentTypeError(f'{text!r} does not end with .png, .svg or .pdf')
    return text


def _hook(config: Config) -> ClassWeightHook:
    """That of the config; where it has none, one with the usual options."""
    from mmseg_imbalance.hooks import ClassWeightHook  # needs MMSegmentation, which --help does not

    hook = hook_of(config)
    if isinstance(hook, ClassWeightHook):
        return hook
    return ClassWeightHook(**{k: v for k, v in (hook or {}).items() if k not in ('type', 'priority')})


def _described(scheme: str, options: Mapping[str, object]) -> str:
    return ', '.join([scheme, *(f'{name}={value!r}' for name, value in options.items())])


def _options() -> argparse.ArgumentParser:
    options = command_parser('class-weights', DESCRIPTION, EXAMPLE)
    add = options.add_argument
    add('config', metavar='CONFIG', help='config file, as for training')
    add(
        '--scheme',
        choices=SCHEMES,
        help='of --out and --plot, with its usual options; default: those of the ClassWeightHook in the '
        'config, else sqrt_inv_freq',
    )
    add('--out', metavar='FILE', help='JSON file to write')
    add('--plot', type=_chart, metavar='FILE', help='chart to write: .png, .svg or .pdf')
    add(
        '--max-images',
        type=int,
        metavar='N',
        help='count a random sample of N images; default: as many as the ClassWeightHook of the '
        'config, else all',
    )
    add('--workers', type=int, metavar='N', help='worker processes; default: those of the train_dataloader')
    add_cache_dir(options)
    add(
        '--label-transforms',
        type=lambda text: [name for name in text.split(',') if name],
        metavar='A,B',
        help="transforms after LoadAnnotations that change what a label means; '' for none; default: those "
        'of your own that need no image',
    )
    add_cfg_options(options)
    return options


def main(argv: list[str] | None = None) -> int:
    options = _options()
    args = options.parse_args(argv)
    try:
        config = read_config(args.config, args.cfg_options)
        hook = _hook(config)
        max_images = hook.max_images if args.max_images is None else args.max_images
        frequency = training_frequency(
            config,
            max_images=max_images,
            num_workers=args.workers,
            cache_dir=args.cache_dir,
            label_transforms=args.label_transforms,
        )
        columns: dict[str, tuple[str, dict]] = {scheme: (scheme, {}) for scheme in SCHEMES}
        chosen = args.scheme or hook.scheme
        if hook.options:
            columns[OF_HOOK] = hook.scheme, hook.options
            chosen = args.scheme or OF_HOOK
        weights, said = {}, {}
        for name, (scheme, also) in columns.items():
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter('always')
                weights[name] = class_weights(frequency, scheme, **also)
            for warning in caught:
                said.setdefault(str(warning.message), []).append(name)
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        options.exit(1, f'{options.prog}: {error}\n')
    # a table of this width is better scrolled than squeezed
    print(table_text(class_table(frequency, weights)))
    if (sources := source_table(frequency)) is not None:
        print(table_text(sources))
    for message, schemes in said.items():
        concerned = '' if len(schemes) == len(weights) else f'{", ".join(schemes)}: '
        print(f'warning: {concerned}{message}')
    if OF_HOOK in columns:
        print(f'{OF_HOOK}: {_described(*columns[OF_HOOK])}')
    scheme, also = columns[chosen]
    try:
        if args.out:
            WeightRecord.count(frequency, weights[chosen], scheme, also, max_images).save(args.out)
            print(f'{_described(scheme, also)} weights: {args.out}')
        if args.plot:
            from mmseg_imbalance.plots import plot_class_weights

            plot_class_weights(frequency, weights[chosen], args.plot, label=f'{scheme} weight')
            print(f'chart: {args.plot}')
    except OSError as error:  # a full disk, a folder that cannot be written
        options.exit(1, f'{options.prog}: {error}\n')
    return 0
