"""Compare trained models class by class: means over seeds, differences to a baseline, what is noise."""

from __future__ import annotations

import argparse
import csv
import json
import math
from pathlib import Path

from compare_page import page
from comparison import NOISE, Comparison, Estimate, Sheet, compare, explanation, sheets
from model_zoo import write_entries
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from work_dirs import Run

from mmseg_imbalance.tables import table_text


def rich_table(sheet: Sheet) -> Table:
    table = Table(title=sheet.title, title_justify='left')
    for number, name in enumerate(sheet.header):
        text = number == 0 or sheet.title in ('Runs', 'Left out')
        table.add_column(escape(name), justify='left' if text else 'right')
    for row in sheet.rows:
        table.add_row(*(f'[dim]{escape(c)}[/dim]' if c.endswith(NOISE) else escape(c) for c in row))
    return table


def markdown(comparison: Comparison) -> str:
    lines = ['# Comparison of runs', '', *explanation(comparison), '']
    for sheet in sheets(comparison):
        rows = [sheet.header, ['---'] * len(sheet.header), *sheet.rows]
        lines += [f'## {sheet.title}', '']
        lines += ['| ' + ' | '.join(cell.replace('|', r'\|') for cell in row) + ' |' for row in rows] + ['']
    lines += [f'- {note}' for note in comparison.notes]
    return '\n'.join(lines).rstrip() + '\n'


def record(comparison: Comparison) -> dict:
    """All numbers, for JSON; NaN is null."""

    def number(value: float | None) -> float | None:
        return None if value is None or math.isnan(value) else value

    def estimate(e: Estimate) -> dict:
        return dict(
            mean=number(e.mean),
            std=number(e.std),
            values=[number(value) for value in e.values],
            difference=number(e.difference),
            seed_noise=number(e.seed_noise),
            interval_over_images=None if e.interval is None else [number(x) for x in e.interval],
            within_noise=e.within_noise,
        )

    def run(r: Run) -> dict:
        names = ('seed', 'source', 'length', 'seconds', 'memory', 'processes', 'hardware', 'notes')
        metrics = {key: number(value) for key, value in r.metrics.items()}
        return (
            dict(work_dir=str(r.work_dir))
            | {name: getattr(r, name) for name in names}
            | dict(metrics=metrics)
        )

    return dict(
        classes=comparison.classes,
        shares=comparison.shares,
        parts=comparison.parts,
        baseline=comparison.groups[0].label,
        configs=[
            dict(
                name=group.name,
                label=group.label,
                runs=[run(r) for r in group.runs],
                estimates={key: estimate(e) for key, e in group.estimates.items()},
            )
            for group in comparison.groups
        ],
        left_out=[dict(work_dir=name, reason=reason) for name, reason in comparison.left_out],
        notes=comparison.notes,
    )


def write(comparison: Comparison, out: Path) -> list[Path]:
    """comparison.md, .csv, .json, .html and .png, its first plot, in a folder."""
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / f'comparison.{kind}' for kind in ('md', 'csv', 'json', 'html', 'png')]
    paths[0].write_text(markdown(comparison), encoding='utf-8')
    with open(paths[1], 'w', newline='', encoding='utf-8') as file:
        rows = csv.writer(file)
        names = ['mean', 'std', 'difference', 'seed_noise', 'low', 'high', 'within_noise']
        rows.writerow(['config', 'quantity', 'share', 'runs', *names])
        for group in comparison.groups:
            for key, e in group.estimates.items():
                low, high = e.interval or (None, None)
                numbers = (e.mean, e.std, e.difference, e.seed_noise, low, high, e.within_noise)
                share = comparison.shares.get(key)
                rows.writerow([group.name, key, share, len(e.values), *numbers])
    paths[2].write_text(json.dumps(record(comparison), indent=2, allow_nan=False) + '\n', encoding='utf-8')
    text, picture = page(comparison, sheets(comparison), explanation(comparison))
    paths[3].write_text(text, encoding='utf-8')
    paths[4].write_bytes(picture)
    return paths


def main(argv=None):
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument('work_dirs', nargs='+', type=Path, metavar='WORK_DIR', help='as train.py left it')
    options.add_argument(
        '--baseline', type=Path, metavar='DIR', help='work dir to compare with; default the first'
    )
    options.add_argument(
        '--out', type=Path, metavar='DIR', help='folder for Markdown, CSV, JSON and an HTML page'
    )
    options.add_argument(
        '--metafile',
        action='store_true',
        help='write the results into the metafiles of configs/, and the pages made from them',
    )
    args = options.parse_args(argv)

    work_dirs = [*args.work_dirs] if args.baseline is None else [args.baseline, *args.work_dirs]
    try:
        comparison = compare(work_dirs, args.baseline)
    except ValueError as error:
        options.exit(1, f'{options.prog}: {error}\n')
    console = Console()
    for sheet in sheets(comparison):
        table = rich_table(sheet)
        if console.is_terminal and console.measure(table).maximum <= console.width:
            console.print(table)
        else:  # better scrolled than squeezed
            print(table_text(table))
    print('\n'.join(explanation(comparison)))
    for note in comparison.notes:
        print(f'note: {note}')
    try:
        for path in write(comparison, args.out) if args.out else ():
            print(path)
        if args.metafile:
            for path in write_entries(comparison):
                print(path)
    except (ValueError, OSError) as error:
        options.exit(1, f'{options.prog}: {error}\n')


if __name__ == '__main__':
    main()
