"""``mmseg-imbalance compare``: means over seeds, differences to a baseline, and what of them is noise."""

from __future__ import annotations

import argparse
from pathlib import Path

from mmseg_imbalance.commands.options import command_parser, need_mmsegmentation

DESCRIPTION = """\
Compare trained models class by class. Give the work dirs of training, several
seeds of a config if you have them: runs whose configs differ in the seed alone
are one row, mean and standard deviation. The result of a work dir is its
newest test, which may lie in a folder below it; without a test, it is the last
validation. A difference to the baseline is "within noise" if its 95 % interval,
over seeds and images together, holds 0; with one run of a config nothing is
called real. Images need ImbalanceIoUMetric, which leaves image_scores.npz. The
page of --out shows predictions of tests with --save-predictions. What cannot be
compared is listed with the reason. IoU is in per cent, training time in
minutes, memory in GB."""
EXAMPLE = """\
work_dirs/plain-0 work_dirs/plain-1 work_dirs/balanced-0 work_dirs/balanced-1 --out comparison"""


def _options() -> argparse.ArgumentParser:
    options = command_parser('compare', DESCRIPTION, EXAMPLE)
    add = options.add_argument
    add('work_dirs', nargs='+', type=Path, metavar='WORK_DIR', help='folder that a training has written')
    add(
        '--baseline',
        type=Path,
        metavar='WORK_DIR',
        help='what the others are compared with; default: the first',
    )
    add(
        '--blocks',
        metavar='REGEX|N',
        help='images that are not independent, such as frames of a video: of one block are those in whose '
        'names REGEX finds the same text, or about N in a row; default: as the baseline was tested',
    )
    add(
        '--out',
        type=Path,
        metavar='DIR',
        help='folder to write comparison.html (tables and plots), .md, .csv, .json and .png into',
    )
    add(
        '--metafile',
        action='store_true',
        help='in a checkout of mmseg-imbalance: write the results into configs/*/metafile.yaml and the pages',
    )
    return options


def main(argv: list[str] | None = None) -> int:
    options = _options()
    args = options.parse_args(argv)
    need_mmsegmentation()
    from mmseg_imbalance.reports.comparison import compare
    from mmseg_imbalance.reports.examples import shown_runs
    from mmseg_imbalance.reports.model_zoo import write_entries
    from mmseg_imbalance.reports.output import write
    from mmseg_imbalance.reports.sheets import explanation, sheets
    from mmseg_imbalance.shipped import configs, is_checkout

    if args.metafile and not is_checkout():
        options.error('--metafile writes into configs/ of a checkout; this is an installed package')
    work_dirs = [*args.work_dirs] if args.baseline is None else [args.baseline, *args.work_dirs]
    try:
        blocks = int(args.blocks) if (args.blocks or '').isdecimal() else args.blocks
        comparison = compare(work_dirs, args.baseline, blocks)
    except ValueError as error:
        options.exit(1, f'{options.prog}: {error}\n')
    tables = sheets(comparison)
    for sheet in tables:
        _show(sheet)
    print('\n'.join(explanation(comparison)))
    for note in (*comparison.notes, *(shown_runs(comparison)[1] if args.out else ())):
        print(f'note: {note}')
    try:
        for path in write(comparison, tables, args.out) if args.out else ():
            print(path)
        if args.metafile:
            for path in write_entries(comparison, configs()):
                print(path)
    except (ValueError, OSError) as error:
        options.exit(1, f'{options.prog}: {error}\n')
    return 0


def _show(sheet) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from mmseg_imbalance.reports.comparison import NOISE
    from mmseg_imbalance.tables import table_text

    table = Table(title=sheet.title, title_justify='left')
    for number, name in enumerate(sheet.header):
        table.add_column(escape(name), justify='left' if number == 0 or sheet.of_text else 'right')
    for row in sheet.rows:
        table.add_row(*(f'[dim]{escape(c)}[/dim]' if c.endswith(NOISE) else escape(c) for c in row))
    console = Console()
    if console.is_terminal and console.measure(table).maximum <= console.width:
        console.print(table)
    else:  # better scrolled than squeezed
        print(table_text(table))
