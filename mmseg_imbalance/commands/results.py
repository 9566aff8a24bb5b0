"""``mmseg-imbalance results``: the page of the results of suites."""

from __future__ import annotations

from pathlib import Path

from mmseg_imbalance.commands.options import command_parser, need_mmsegmentation

DESCRIPTION = """\
Write the page DIR.md, and its plots into DIR, from the rows that
mmseg-imbalance suite has put into DIR/*.csv: means over seeds, differences to
the baseline paired by seed, tests corrected by Holm, which differences are
significant and what is not beyond noise. The same rows give the same page."""


def main(argv: list[str] | None = None) -> int:
    options = command_parser('results', DESCRIPTION, 'docs/results')
    options.add_argument('folder', type=Path, metavar='DIR', help='of the rows')
    options.add_argument('--baseline', default='cross-entropy', metavar='METHOD', help='default: %(default)s')
    args = options.parse_args(argv)
    need_mmsegmentation()
    from mmseg_imbalance.reports.results import read_results
    from mmseg_imbalance.reports.results_page import write_results

    try:
        for path in write_results(read_results(args.folder.resolve(), args.baseline), args.folder.resolve()):
            print(path)
    except (ValueError, OSError) as error:
        options.exit(1, f'{options.prog}: {error}\n')
    return 0
