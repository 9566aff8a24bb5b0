"""The files of a comparison: Markdown, CSV, JSON, an HTML page and its first plot."""

from __future__ import annotations

import csv
import json
import math
from io import StringIO
from pathlib import Path

from mmseg_imbalance.files import write_atomically
from mmseg_imbalance.reports.comparison import Comparison, Estimate
from mmseg_imbalance.reports.page import page
from mmseg_imbalance.reports.sheets import Sheet, markdown
from mmseg_imbalance.reports.work_dirs import Run


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
            interval=None if e.interval is None else [number(x) for x in e.interval],
            interval_over=e.noise,
            within_noise=e.within_noise,
        )

    def run(r: Run) -> dict:
        names = ('seed', 'source', 'data', 'length', 'seconds', 'memory', 'processes', 'hardware', 'notes')
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


def write(comparison: Comparison, tables: list[Sheet], out: Path) -> list[Path]:
    """comparison.md, .csv, .json, .html and .png, its first plot, in a folder."""
    text, picture = page(comparison, tables)
    numbers = json.dumps(record(comparison), indent=2, allow_nan=False) + '\n'
    text_of_tables = markdown(comparison, tables)
    contents = dict(md=text_of_tables, csv=table(comparison), json=numbers, html=text, png=picture)
    paths = []
    for kind, content in contents.items():
        paths.append(out / f'comparison.{kind}')
        with write_atomically(paths[-1], 'wb' if isinstance(content, bytes) else 'w') as file:
            file.write(content)
    return paths


def table(comparison: Comparison) -> str:
    """A row of CSV for each config and quantity."""
    text = StringIO(newline='')
    rows = csv.writer(text)
    names = ['mean', 'std', 'difference', 'low', 'high', 'interval_over', 'within_noise']
    rows.writerow(['config', 'quantity', 'share', 'runs', *names])
    for group in comparison.groups:
        for key, e in group.estimates.items():
            low, high = e.interval or (None, None)
            numbers = (e.mean, e.std, e.difference, low, high, e.noise, e.within_noise)
            share = comparison.shares.get(key)
            rows.writerow([group.name, key, share, len(e.values), *numbers])
    return text.getvalue()
