"""The rows of the matrix, with a few tests in place of all of them."""

import sys
from pathlib import Path

import matrix
import pytest

PASSES = 'def test_one():\n    pass\n'


def row(monkeypatch, folder, files):
    """The line of the table for these test files, and whether the row passed."""
    for name, text in files.items():
        Path(folder, name).write_text(text)
    monkeypatch.setattr(matrix, 'REPOSITORY', folder)
    monkeypatch.setattr(matrix, 'VERSIONS', 'print("a|b|c|d|e|f")')
    monkeypatch.delenv('PYTEST_ADDOPTS', raising=False)
    return matrix.test('newest', sys.executable)


def test_a_row_passes_where_all_tests_do(monkeypatch, tmp_path):
    skips = 'import pytest\n@pytest.mark.skip\ndef test_other():\n    pass\n'
    line, passed = row(monkeypatch, tmp_path, {'test_a.py': PASSES + skips})
    assert line == '| newest | a | b | c | d | e | f | 1 / 0 / 1 |'
    assert passed


@pytest.mark.parametrize(
    ('files', 'result'),
    [
        ({'test_a.py': PASSES + 'def test_other():\n    assert False\n'}, '1 / 1 / 0'),
        ({'test_a.py': PASSES, 'test_b.py': 'import nowhere\n'}, '0 / 1 / 0, pytest ended with status 2'),
        ({'test_a.py': ''}, '0 / 0 / 0, pytest ended with status 5'),
        (
            {
                'test_a.py': PASSES,
                'conftest.py': 'def pytest_sessionfinish(session):\n    session.exitstatus = 1\n',
            },
            '1 / 0 / 0, pytest ended with status 1',
        ),
        (
            {
                'test_a.py': PASSES,
                'conftest.py': 'import os\ndef pytest_unconfigure():\n    os.kill(os.getpid(), 9)\n',
            },
            '1 / 0 / 0, pytest ended with status -9',
        ),
        (
            {'test_a.py': 'import os\ndef test_one():\n    os.kill(os.getpid(), 9)\n'},
            'the tests did not start, or broke off: pytest ended with status -9',
        ),
        (
            {'conftest.py': 'import nowhere\n'},
            'the tests did not start, or broke off: pytest ended with status 4',
        ),
    ],
)
def test_a_row_fails_with_a_test_or_with_pytest_itself(monkeypatch, tmp_path, files, result):
    line, passed = row(monkeypatch, tmp_path, files)
    assert line == f'| newest | a | b | c | d | e | f | {result} |'
    assert not passed


def test_where_no_row_is_run_none_has_passed(monkeypatch, capsys):
    monkeypatch.setattr(matrix, 'interpreter', lambda version: None)
    assert matrix.main(['oldest', 'newest']) == 1
    assert '| newest | left out: there is no python3.13 |' in capsys.readouterr().out


def test_rows_are_all_run_and_each_has_to_pass(monkeypatch, capsys):
    monkeypatch.setattr(matrix, 'interpreter', lambda version: sys.executable)
    monkeypatch.setattr(matrix, 'install', lambda name, row, python: python)
    monkeypatch.setattr(matrix, 'test', lambda name, python: (f'| {name} |', name != 'oldest'))
    assert matrix.main(['oldest', 'newest']) == 1
    assert '| oldest |\n| newest |' in capsys.readouterr().out
    assert matrix.main(['newest']) == 0
