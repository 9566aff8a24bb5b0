"""Count the classes of a config's training data set and compare weighting schemes."""

import argparse
import json
import warnings

from mmengine.config import Config, DictAction
from mmengine.registry import init_default_scope

from mmseg_imbalance.counting import training_frequency
from mmseg_imbalance.files import write_atomically
from mmseg_imbalance.plots import plot_class_weights
from mmseg_imbalance.tables import class_table, table_text
from mmseg_imbalance.weighting import SCHEMES, class_weights, weight_record


def main(argv=None):
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument('config', help='config file')
    options.add_argument('--scheme', choices=SCHEMES, default='sqrt_inv_freq', help='of --out and --plot')
    options.add_argument('--out', help="JSON file to write, for class_weight='FILE'")
    options.add_argument('--plot', help='chart to write (.png, .svg, .pdf)')
    options.add_argument('--max-images', type=int, help='count a random sample of so many images')
    options.add_argument('--workers', type=int, default=2, help='worker processes')
    options.add_argument('--cache-dir', help='folder of the counts')
    options.add_argument('--cfg-options', nargs='+', action=DictAction, metavar='KEY=VALUE')
    args = options.parse_args(argv)

    try:
        cfg = Config.fromfile(args.config)
        if args.cfg_options:
            cfg.merge_from_dict(args.cfg_options)
        init_default_scope(cfg.get('default_scope', 'mmseg'))
        frequency = training_frequency(
            cfg, max_images=args.max_images, num_workers=args.workers, cache_dir=args.cache_dir
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
    if args.out:
        record = weight_record(frequency, weights[args.scheme])
        with write_atomically(args.out) as file:
            json.dump(record | dict(scheme=args.scheme), file, indent=2)
        print(f'{args.scheme} weights: {args.out}')
    if args.plot:
        plot_class_weights(frequency, weights[args.scheme], args.plot, label=f'{args.scheme} weight')
        print(f'chart: {args.plot}')


if __name__ == '__main__':
    main()
