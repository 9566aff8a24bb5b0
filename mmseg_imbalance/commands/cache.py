"""``mmseg-imbalance cache``: the files in which class counts are kept."""

from __future__ import annotations

from datetime import datetime

from rich.markup import escape
from rich.table import Table

from mmseg_imbalance.commands.options import add_cache_dir, command_parser
from mmseg_imbalance.counting.cache import (
    MAX_BYTES,
    MAX_FILES,
    CachedCounts,
    cached_counts,
    clear,
    default_cache_dir,
)
from mmseg_imbalance.frequency import ClassFrequency
from mmseg_imbalance.tables import table_text

DESCRIPTION = f"""\
List the files in which class counts are kept, those used last first. There are
at most {MAX_FILES} files and {MAX_BYTES / 1e9:.0f} GB; what was not used for longest goes first.
--clear removes all; the next run counts anew."""
EXAMPLE = """\

--clear"""
NAMED = 4  # classes


def main(argv: list[str] | None = None) -> int:
    options = command_parser('cache', DESCRIPTION, EXAMPLE)
    options.add_argument('--clear', action='store_true', help='remove the files')
    add_cache_dir(options)
    args = options.parse_args(argv)
    try:
        folder = args.cache_dir or default_cache_dir()
        if args.clear:
            print(f'{clear(folder)} files of class counts removed from {folder}')
            return 0
        files = cached_counts(folder)
    except (OSError, RuntimeError) as error:
        options.exit(1, f'{options.prog}: {error}\n')
    if files:
        print(table_text(_table(files)))
    size = sum(file.size for file in files)
    print(f'{len(files)} files of class counts, {size / 1e6:,.1f} MB, in {folder}')
    return 0


def _table(files: list[CachedCounts]) -> Table:
    table = Table()
    for name in ('file', 'classes', 'data sets', 'counted'):
        table.add_column(name)
    for name in ('images', 'MB', 'last used'):
        table.add_column(name, justify='right')
    for file in files:
        try:
            frequency = ClassFrequency.load(file.path)
        except (OSError, ValueError) as error:
            cells = [f'damaged: {error}'.partition('\n')[0][:60], '', '', '']
        else:
            classes, sources = frequency.classes, frequency.source_names or ()
            listed = ', '.join(classes[:NAMED]) + (', ...' if len(classes) > NAMED else '')
            cells = [
                f'{len(classes)}: {listed}',
                ', '.join(sources),
                frequency.counted or '',
                f'{frequency.num_images:,} of {frequency.dataset_images:,}',
            ]
        used = datetime.fromtimestamp(file.used).isoformat(' ', 'seconds')
        table.add_row(*map(escape, [file.path.name, *cells, f'{file.size / 1e6:,.1f}', used]))
    return table
