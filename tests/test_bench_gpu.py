"""The benchmark of a GPU: cases that are done stay done, and what is missing says why."""

import json
import re
import sys
from importlib.util import module_from_spec, spec_from_file_location

import pytest
from conftest import REPOSITORY

from mmseg_imbalance.benchmark.tables import FORMATS
from mmseg_imbalance.commands.benchmark import parse

spec = spec_from_file_location('bench_gpu', REPOSITORY / 'tools' / 'bench_gpu.py')
bench_gpu = module_from_spec(spec)
spec.loader.exec_module(bench_gpu)

ROW = dict(batch='2x19x8x8', logits='8x8', loss='ours, triton', ours=True, skipped=None, note='')
ROW |= dict.fromkeys(FORMATS, 0.5)
BENCHMARK = """
import json, sys, time
from pathlib import Path
_, kind, name, rows, _, path = sys.argv
log = Path(path).with_name('calls')
log.write_text(log.read_text() + name if log.exists() else name)
if name == 'slow': time.sleep(60)
if name == 'broken' and not log.read_text().startswith('well'): sys.exit('no such device')
Path(path).write_text(json.dumps(dict(title='one device', rows=json.loads(rows))))
sys.exit(3)
"""


@pytest.fixture
def start(tmp_path, monkeypatch):
    """A call with these cases: its status, its table and the cases that it started."""

    def call(*cases, minutes=1):
        monkeypatch.setattr(bench_gpu, 'find_cases', lambda dry_run: list(cases))
        (tmp_path / 'calls').unlink(missing_ok=True)
        status = bench_gpu.main(['--out', str(tmp_path), '--minutes', str(minutes)])
        calls = tmp_path / 'calls'
        return status, (tmp_path / 'table.md').read_text(), calls.read_text() if calls.exists() else ''

    return call


def benchmark(name, rows=(ROW,), needs=False):
    command = [sys.executable, '-c', BENCHMARK, 'benchmark', name, json.dumps(rows)]
    return bench_gpu.Case(name, command, needs)


def test_a_finished_case_is_not_run_again(start):
    status, table, calls = start(benchmark('one'))
    assert (status, calls) == (0, 'one')
    assert '## one\n\none device\n' in table
    assert '| 2x19x8x8 | 8x8 | ours, triton | 0.5 |' in table
    assert '| GB/s | bandwidth | Gexp/s |' in table
    status, table, calls = start(benchmark('one'), benchmark('two'))
    assert (status, calls) == (0, 'two')
    assert table.index('## one') < table.index('## two')


def test_a_case_that_failed_says_why_and_comes_last_in_the_next_call(start):
    status, table, calls = start(benchmark('broken'))
    assert (status, calls) == (1, 'broken')
    assert 'None: status 1: no such device' in table
    status, table, calls = start(benchmark('broken'), benchmark('well'))
    assert (status, calls) == (0, 'wellbroken')
    assert 'no such device' not in table


def test_the_limit_of_time_cuts_off_a_case_and_starts_no_other(start, monkeypatch):
    monkeypatch.setattr(bench_gpu, 'LEAST', 1)
    status, table, calls = start(benchmark('slow'), benchmark('one'), minutes=1.5 / 60)
    assert (status, calls) == (2, 'slow')
    assert re.search(r'## slow\n\nNone: did not end in \d s', table)
    assert '## one\n\nNone: not started' in table


def test_numbers_that_are_off_fail_the_call(start):
    assert start(benchmark('one', [ROW | dict(ms=None)]))[0] == 1
    assert start(benchmark('one'))[0] == 1, 'in the next call too'


def test_what_needs_mmsegmentation_is_skipped_with_the_reason(start, monkeypatch):
    monkeypatch.setattr(bench_gpu, 'why_no_mmsegmentation', lambda: 'No module named mmseg')
    status, table, calls = start(benchmark('step', needs=True), benchmark('one'))
    assert (status, calls) == (0, 'one')
    assert '## step\n\nNone: skipped: No module named mmseg' in table


def test_tests_are_a_case_whose_summary_is_the_result(start):
    def tests(code):
        script = f'print("2 passed\\nsee"); exit({code})'
        return bench_gpu.Case('tests-kernels', [sys.executable, '-c', script], False)

    status, table, _ = start(tests(1))
    assert status == 1
    assert 'None: status 1: 2 passed' in table
    status, table, _ = start(tests(0))
    assert status == 0
    assert '## tests-kernels\n\n2 passed\n' in table


def test_the_cases_are_what_is_asked_of_a_gpu():
    cases = {case.name: case.command for case in bench_gpu.find_cases(dry_run=False)}
    tests = [part for name in ('tests-kernels', 'tests-others') for part in cases[name] if 'tests/' in part]
    recipe = re.search(r'\ntest-gpu:.*?\n\n', (REPOSITORY / 'Makefile').read_text(), re.S)[0]
    assert tests == re.findall(r'tests/\w+\.py', recipe)
    for dtype in ('float16', 'bfloat16', 'float32'):
        for classes in ('19', '150'):
            command = cases[f'losses-{dtype}-{classes}']
            assert command[command.index('--dtype') :] == ['--dtype', dtype, '--classes', classes]
    for model in ('segformer', 'deeplabv3'):
        assert cases[f'{model}-float16'][-2:] == ['--step', model]
    assert {'--subclass', '--recall'} < set(cases['others-float16'])
    assert cases.keys() == {case.name for case in bench_gpu.find_cases(dry_run=True)}


@pytest.mark.parametrize('dry_run', [False, True])
def test_the_benchmark_command_knows_their_options(dry_run):
    cases = [case for case in bench_gpu.find_cases(dry_run) if 'benchmark' in case.command]
    assert len(cases) == 12
    for case in cases:
        args = parse(case.command[case.command.index('benchmark') + 1 :])
        assert args.bandwidth
        assert args.device == ('cpu' if dry_run else 'cuda')


@pytest.mark.slow
def test_every_case_runs_on_a_cpu_with_small_sizes(tmp_path):
    assert bench_gpu.main(['--dry-run', '--out', str(tmp_path), '--minutes', '60']) == 0
    table = (tmp_path / 'table.md').read_text()
    assert 'None:' not in table
    rows = [row for path in tmp_path.glob('*.json') for row in json.loads(path.read_text())['rows']]
    ours = [row for row in rows if row['ours']]
    assert len(ours) > 50
    assert all(row['ms'] for row in ours)
