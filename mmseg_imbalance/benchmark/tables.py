"""What was measured, as a table for the terminal, in Markdown, and as bars."""

import statistics
from itertools import groupby

from rich import box
from rich.markup import escape
from rich.table import Table

from mmseg_imbalance.plots import save_figure
from mmseg_imbalance.tables import markdown_table, table_text

FORMATS = {
    'ms': '.3g',
    'host_ms': '.3g',
    'time_ratio': '.2f',
    'MB': '.3g',
    'memory_ratio': '.2f',
    'GB/s': '.3g',
    'bandwidth': '.0%',
    'Gexp/s': '.3g',
    'off_by': '.0e',
}


def record(case, row, bandwidth):
    """The line of a row in the table."""
    base = case.rows[0]
    line = dict(batch=case.batch, logits=case.logits, loss=row.name, ours=row.ours)
    line |= dict.fromkeys(FORMATS) | dict(off_by=row.off_by, skipped=row.skipped, note=row.note)
    if row.peak:
        line |= dict(MB=row.peak / 1e6, memory_ratio=base.peak and row.peak / base.peak)
    if row.seconds and row.right:
        median = statistics.median(row.seconds)
        ratios = [mine / its for mine, its in zip(row.seconds, base.seconds, strict=False)]
        line |= dict(ms=1e3 * median / case.files, time_ratio=statistics.median(ratios) if ratios else None)
        if any(row.host_seconds):
            line['host_ms'] = 1e3 * statistics.median(row.host_seconds)
        if bandwidth and case.least_bytes:
            moved = case.least_bytes / median
            line |= {'GB/s': moved / 1e9, 'bandwidth': moved / bandwidth}
            line['Gexp/s'] = case.exponentials / median / 1e9
    return line


def cells(record):
    """What is shown of a record, as text by column."""
    note = f'skipped: {record["skipped"]}' if record['skipped'] else record['note']
    if record['ms'] is None and not record['skipped']:
        note = f'off, so no speed. {note}'
    text = {
        name: '-' if record[name] is None else format(record[name], form) for name, form in FORMATS.items()
    }
    return dict(batch=record['batch'], logits=record['logits'], loss=record['loss'], **text, note=note)


def without_empty(lines):
    """The lines without columns in which nothing was measured."""
    empty = {name for name in FORMATS if name != 'ms' and all(line[name] == '-' for line in lines)}
    return [{name: text for name, text in line.items() if name not in empty} for line in lines]


def show(lines, title, numbers=tuple(FORMATS), groups=('batch', 'logits')):
    """The table of a terminal; ``numbers`` are aligned to the right, ``groups`` are apart."""
    table = Table(title=escape(title), box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for name in lines[0]:
        table.add_column(name.replace('_', '\n'), justify='right' if name in numbers else 'left')
    for _, group in groupby(lines, lambda line: [line[name] for name in groups]):
        for line in group:
            table.add_row(*map(escape, line.values()))
        table.add_section()
    return table_text(table)


def markdown(lines, title, numbers=tuple(FORMATS)):
    """The same for GitHub."""
    header, numbers = ([name.replace('_', ' ') for name in names] for names in (lines[0], numbers))
    return '\n'.join([title, '', *markdown_table(header, (line.values() for line in lines), numbers)])


def plot(records, title, path):
    """Bars of the time and memory ratio, one pair of panels for each batch and size of the logits."""
    from matplotlib.figure import Figure

    records = [record for record in records if not record['skipped']]
    groups = [list(group) for _, group in groupby(records, lambda r: f'{r["batch"]}, logits {r["logits"]}')]
    rows = [len(group) for group in groups]
    figure = Figure(figsize=(11, 1 + sum(0.5 + 0.27 * n for n in rows)), layout='constrained')
    panels = figure.subplots(len(groups), 2, squeeze=False, sharey='row', height_ratios=rows)
    for group, pair in zip(groups, panels, strict=True):
        for axes, key in zip(pair, ('time_ratio', 'memory_ratio'), strict=True):
            bars(axes, group, key)
        pair[0].set_title(f'{group[0]["batch"]}, logits {group[0]["logits"]}', loc='left', fontsize=10)
        pair[0].invert_yaxis()
    for axes, label in zip(panels[-1], ('time', 'extra memory'), strict=True):
        axes.set_xlabel(f'{label} / that of the first row')
    figure.suptitle(title, fontsize=10)
    save_figure(figure, path, dpi=120)


def bars(axes, group, key):
    values = [record[key] or 0 for record in group]
    colors = ['#d1783c' if record['ours'] else '#4878a8' for record in group]
    drawn = axes.barh([record['loss'] for record in group], values, color=colors)
    axes.bar_label(drawn, [f'{value:.2f}' if value else 'none' for value in values], padding=3, fontsize=8)
    axes.axvline(1, color='0.4', linewidth=0.8, linestyle=':')
    axes.set_xlim(0, 1.15 * max(1, *values))
    axes.spines[['top', 'right']].set_visible(False)
