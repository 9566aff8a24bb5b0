"""The tables of a comparison as text, and how to read them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from mmseg_imbalance.reports.comparison import NOISE, Comparison, Estimate, Group
from mmseg_imbalance.reports.confusion import confusion_tables
from mmseg_imbalance.tables import markdown_table


class Sheet(NamedTuple):
    """A table of text, shown in the terminal, in Markdown and in HTML."""

    title: str
    header: list[str]
    rows: list[list[str]]

    @property
    def of_text(self) -> bool:
        """Whether its cells are text, not numbers."""
        return self.title in ('Runs', 'Left out')


def sheets(comparison: Comparison) -> list[Sheet]:
    """The tables of a comparison."""
    groups = comparison.groups
    runs = [
        [
            *((group.label, group.name) if number == 0 else ('', '')),
            '-' if run.seed is None else str(run.seed),
            str(run.work_dir),
            run.source,
            run.data,
            '-' if run.length is None else f'{run.length:,}',
            _duration(run.seconds),
            '-' if run.memory is None else f'{run.memory / 1024:.2f} GB',
            '-' if run.hardware is None else f'{run.processes}x {run.hardware}',
        ]
        for group in groups
        for number, run in enumerate(group.runs)
    ]
    header = ['name', 'config', 'seed', 'work dir', 'result']
    header += ['tested on', 'length', 'training', 'memory', 'hardware']
    shown = [Sheet('Runs', header, runs)]
    columns = [groups[0].label] + [
        f'{group.label}{what}' for group in groups[1:] for what in ('', ': difference')
    ]
    rows = [[key, *_numbers(groups, key)] for key in comparison.summaries]
    shown.append(Sheet('Summary, %', ['', *columns], rows))
    part_of = {name: part for part, members in comparison.parts.items() for name in members}
    about = {name: [f'{share:.2%}', part_of.get(name, '-')] for name, share in comparison.shares.items()}
    rows = [[name, *about.get(name, ()), *_numbers(groups, name)] for name in comparison.classes]
    header = ['class', *(['share', 'part'] if about else []), *columns]
    shown.append(Sheet('IoU of each class, %', header, rows))
    if comparison.confusion is not None:
        shown += [Sheet(*table) for table in confusion_tables(comparison.confusion)]
    if comparison.left_out:
        shown.append(Sheet('Left out', ['work dir', 'reason'], [list(row) for row in comparison.left_out]))
    return shown


def _numbers(groups: list[Group], key: str) -> Iterator[str]:
    """Of each config its mean and, behind it, the difference to the baseline, which has none."""
    for group in groups:
        yield _value(group.estimates[key])
        if group is not groups[0]:
            yield _difference(group.estimates[key])


def _value(estimate: Estimate) -> str:
    if math.isnan(estimate.mean):
        return '-'
    return f'{estimate.mean:.2f}' + ('' if estimate.std is None else f' ± {estimate.std:.2f}')


def _difference(estimate: Estimate) -> str:
    if estimate.difference is None or math.isnan(estimate.difference):
        return '-'
    text = f'{estimate.difference:+.2f}'
    if estimate.within_noise is None:
        return f'{text}, seeds unknown' if estimate.noise == 'images' else f'{text}, noise unknown'
    return f'{text} {NOISE}' if estimate.within_noise else text


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return '-'
    minutes = round(seconds / 60)
    return f'{minutes // 60} h {minutes % 60} min' if minutes >= 60 else f'{seconds / 60:.1f} min'


def explanation(comparison: Comparison) -> list[str]:
    """How to read the tables."""
    groups = comparison.groups
    lines = [
        f'Means over the runs of a config ± their standard deviation; differences are to {groups[0].label}.'
    ]
    if len(groups) > 1:
        lines += _noise(comparison)
    lines.append('Training is estimated from the logged times of iterations; peak memory is logged on GPUs.')
    return lines


def _noise(comparison: Comparison) -> Iterator[str]:
    kinds = {estimate.noise for group in comparison.groups for estimate in group.estimates.values()}
    if min(len(group.runs) for group in comparison.groups) < 2:
        yield (
            'A config with one run: how much another seed would change is not known, so no difference to it '
            'or of it is called real. Train each config with three seeds or more.'
        )
    if comparison.images is not None:
        what = f'{comparison.images} images'
        if comparison.blocks != comparison.images:
            what += (
                f' in {comparison.blocks} blocks, which are left out one by one (frames are not independent)'
            )
        yield (
            f'The 95 % interval of a difference of IoU is over seeds and images together, of {what}: what '
            'other seeds and other images of the same kind would give. A class in less than two of them has '
            'no interval.'
        )
    if 'seeds' in kinds:
        what = (
            'The 95 % interval of other numbers' if comparison.images else 'The 95 % interval of a difference'
        )
        yield f'{what} is over seeds alone: it holds for the tested images.'
    yield (
        f'A difference is "{NOISE}" if its interval holds 0. Many differences are looked at together: at '
        '95 %, one in twenty is beyond noise by chance.'
    )


def markdown(comparison: Comparison, tables: list[Sheet]) -> str:
    """The text of a comparison and its tables, see :func:`sheets`."""
    lines = ['# Comparison of runs', '', *explanation(comparison), '']
    for sheet in tables:
        lines += [f'## {sheet.title}', '', *markdown_table(sheet.header, sheet.rows)]
    lines += [f'- {note}' for note in comparison.notes]
    return '\n'.join(lines).rstrip() + '\n'
