"""``mmseg-imbalance model-zoo``: the README.md of each folder of configs, from its metafile."""

from __future__ import annotations

from pathlib import Path

from mmseg_imbalance.commands.options import command_parser, need_mmsegmentation

DESCRIPTION = """\
Write the model-zoo pages, README.md in each folder of configs, from the
metafile.yaml and the configs beside it. Results get into the metafiles by
mmseg-imbalance compare --metafile."""
EXAMPLE = 'configs'


def main(argv: list[str] | None = None) -> int:
    options = command_parser('model-zoo', DESCRIPTION, EXAMPLE)
    options.add_argument(
        'configs',
        nargs='?',
        type=Path,
        metavar='DIR',
        help='folder of the folders of configs; default: configs/ of the checkout',
    )
    args = options.parse_args(argv)
    need_mmsegmentation()
    from mmseg_imbalance.reports.model_zoo import write_page
    from mmseg_imbalance.shipped import configs, is_checkout

    if args.configs is None and not is_checkout():
        options.error('give the folder of the configs; only in a checkout it can be left out')
    folder = args.configs or configs()
    metafiles = sorted(folder.glob('[!_]*/metafile.yaml'))
    if not metafiles:
        options.error(
            f'{folder} holds no folder with a metafile.yaml; give the folder of the folders of configs'
        )
    for metafile in metafiles:
        print(write_page(metafile.parent))
    return 0
