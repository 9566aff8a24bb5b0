"""All that is measured on a GPU, case by case: its tests, the losses, training steps, and a table of them.

Each case is a process of its own, and its result a file in --out. The same command goes on where the last one
ended; another version or another device needs another folder.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

from mmseg_imbalance.benchmark.tables import cells, markdown, without_empty
from mmseg_imbalance.commands.options import need_mmsegmentation
from mmseg_imbalance.files import write_atomically

REPOSITORY = Path(__file__).parents[1]
KERNEL_TESTS = ['tests/test_soft_stats.py', 'tests/test_term_kernel.py']
OTHER_TESTS = ['tests/test_heads.py', 'tests/test_subclass.py']
DTYPES = ('float16', 'float32', 'bfloat16')
GPU = ['--device', 'cuda', '--rounds', '5', '--backend', 'eager', 'strips', 'triton']
SMALL = ['--device', 'cpu', '--rounds', '1', '--backend', 'eager', 'strips', 'triton', '--bandwidth']
SMALL += ['--size', '16x32', '--step-size', '64x64']
LEAST = 15  # seconds, below which no case would come to an end
NOT_STARTED, CUT, SKIPPED = 'not started', 'did not end', 'skipped'


class Case(NamedTuple):
    """A process that writes the result, or whose success is the result."""

    name: str
    command: list[str]
    needs_mmsegmentation: bool = True


def find_cases(dry_run: bool) -> list[Case]:
    """In the order in which they matter; on a CPU with small sizes if ``dry_run``."""
    test = [sys.executable, '-m', 'pytest', '-q', *(['--collect-only'] if dry_run else [])]
    cases = [
        Case('tests-kernels', [*test, *KERNEL_TESTS], False),
        Case('tests-others', [*test, *OTHER_TESTS]),
    ]

    def add(name, *options, **needs):
        command = [sys.executable, '-m', 'mmseg_imbalance', 'benchmark', *(SMALL if dry_run else GPU)]
        cases.append(Case(name, [*command, *options], **needs))

    for dtype in DTYPES:
        for classes in ('19', '150'):
            # compiling takes most of the time, and is the same in each of them
            less = ['--no-competitors'] if dry_run and len(cases) > 2 else []
            options = ['--dtype', dtype, '--classes', classes, *less]
            add(f'losses-{dtype}-{classes}', *options, needs_mmsegmentation=False)
        if dtype != 'bfloat16':
            on_step = 'bfloat16' if dry_run and dtype == 'float16' else dtype  # no float16 on a CPU
            for model in ('segformer', 'deeplabv3'):
                add(f'{model}-{dtype}', '--dtype', on_step, '--scale', '--step', model)
            add(f'others-{dtype}', '--dtype', dtype, '--no-losses', '--subclass', '--recall')
    return cases


def why_no_mmsegmentation() -> str:
    try:
        need_mmsegmentation()
    except ImportError as error:
        return str(error)
    return ''


def run(case: Case, out: Path, seconds: float, environment: dict[str, str]) -> str:
    """Write ``NAME.json`` into ``out``; why not, or ''."""
    result, log = out / f'{case.name}.json', out / f'{case.name}.log'
    writes = 'benchmark' in case.command
    command = [*case.command, *(['--json', str(result)] if writes else [])]
    with log.open('w') as file:
        options = dict(stdout=file, stderr=subprocess.STDOUT, env=environment, cwd=REPOSITORY)
        try:
            done = subprocess.run(command, timeout=seconds, **options)
        except subprocess.TimeoutExpired:
            return f'{CUT} in {seconds:.0f} s'
    lines = [line for line in log.read_text(errors='replace').splitlines() if line.strip()]
    if not writes:  # libraries may have something to say after pytest
        summary = re.compile(r'\d (passed|failed|errors?|tests collected)')
        lines = [line for line in lines if summary.search(line)] or lines
    last = ''.join(lines[-1:])
    if not writes and done.returncode == 0:
        with write_atomically(result) as file:
            json.dump(dict(title=last, rows=[]), file)
    # a benchmark with a row that is off ends with 1, and has been done
    return '' if result.exists() else f'status {done.returncode}: {last}'


def table(cases: list[Case], out: Path, reasons: dict[str, str]) -> str:
    """All results that are there, in Markdown, and why others are not."""
    text = []
    for case in cases:
        result = out / f'{case.name}.json'
        text += [f'## {case.name}', '']
        if not result.exists():
            text += [f'None: {reasons[case.name]}', '']
            continue
        found = json.loads(result.read_text())
        lines = without_empty([cells(row) for row in found['rows']])
        text.append(markdown(lines, found['title']) if lines else found['title'] + '\n')
    return '\n'.join(text)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--out', type=Path, default='bench-gpu', help='folder; default %(default)s')
    parser.add_argument('--minutes', type=float, default=8, metavar='X', help='at most; default %(default)s')
    parser.add_argument('--dry-run', action='store_true', help='every case on a CPU, with small sizes')
    return parser.parse_args(argv)


def measure(cases: list[Case], out: Path, end: float, environment: dict[str, str]) -> dict[str, str]:
    """Run what has no result yet, until the time ``end``; the reason by the name of each that has none."""
    absent, reasons = why_no_mmsegmentation(), {}
    todo = [case for case in cases if not (out / f'{case.name}.json').exists()]
    todo.sort(key=lambda case: (out / f'{case.name}.log').exists())  # what had no result before comes last
    for case in todo:
        left = end - time.monotonic()
        if case.needs_mmsegmentation and absent:
            reasons[case.name] = f'{SKIPPED}: {absent}'
        elif left < LEAST:
            reasons[case.name] = NOT_STARTED
        else:
            tests = case.name.startswith('tests')
            # half of the time is for speed, however long tests take
            if reason := run(case, out, left / 2 if tests else left, environment):
                reasons[case.name] = reason
        print(f'{case.name}: {reasons.get(case.name, "done")}', flush=True)
    return reasons


def is_off(out: Path) -> bool:
    """Whether a row of this package has no speed, because its numbers are off."""
    found = [json.loads(path.read_text())['rows'] for path in out.glob('*.json')]
    return any(row['ours'] and not row['skipped'] and row['ms'] is None for rows in found for row in rows)


def main(argv: list[str] | None = None) -> int:
    """0: all is measured; 1: something failed or is off; 2: the time was over before the end."""
    start = time.monotonic()
    args = parse(argv)
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    paths = [str(REPOSITORY), *filter(None, [os.environ.get('PYTHONPATH')])]
    environment = os.environ | {'PYTHONPATH': os.pathsep.join(paths)}
    if args.dry_run:
        environment['TRITON_INTERPRET'] = '1'
    cases = find_cases(args.dry_run)
    reasons = measure(cases, out, start + 60 * args.minutes, environment)
    text = table(cases, out, reasons)
    with write_atomically(out / 'table.md') as file:
        file.write(text)
    print(f'\n{text}\n{out / "table.md"}: {len(cases) - len(reasons)} of {len(cases)} cases')
    cut = {name for name, reason in reasons.items() if reason.startswith((NOT_STARTED, CUT))}
    skipped = {name for name, reason in reasons.items() if reason.startswith(SKIPPED)}
    if cut:
        print(f'the time was over before {len(cut)} cases had ended; the same command goes on with them')
    return 1 if reasons.keys() - cut - skipped or is_off(out) else 2 if cut else 0


if __name__ == '__main__':
    sys.exit(main())
