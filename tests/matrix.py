"""Run the tests on the oldest and the newest of what is supported, each in its own environment.

    make test-matrix
    make test-matrix ROWS=oldest PYTEST_ADDOPTS="-m 'not slow'"

A row whose Python is not installed is left out, with the reason. Environments are made once, .venv-ROW. It
ends with a table as in docs/faults.md, and with status 1 if a row failed, by a test or by pytest itself, or
if none was run.
"""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

REPOSITORY = Path(__file__).parents[1]
PIP = ['-m', 'pip', 'install', '--quiet', '--disable-pip-version-check']


class Row(NamedTuple):
    """What is installed, a call of pip for each list."""

    python: str
    installs: list[list[str]]


OLD = ['numpy<2', 'opencv-python<4.12']  # what torch 2.1 was built for
# mmcv 2.1 has no wheel for recent versions of torch and needs what pip's build isolation hides from it
MMCV = [['setuptools<81', 'wheel'], ['--no-build-isolation', 'mmcv==2.1.0']]
UPSTREAM = ['--no-build-isolation', '-e', '.[openmmlab,test]']
ROWS = {
    'oldest': Row('3.10', [['torch==2.1.2', *OLD], *MMCV, [*UPSTREAM, *OLD]]),
    'newest': Row('3.13', [['torch'], ['--upgrade', '--upgrade-strategy=eager', '-e', '.[onedl,test]']]),
    'newest-openmmlab': Row('3.13', [['torch'], *MMCV, UPSTREAM]),
}
VERSIONS = """
import platform, torch, numpy, mmcv, mmengine, mmseg
from importlib.metadata import packages_distributions as of
print(platform.python_version(), torch.__version__, numpy.__version__,
      *(f'{of()[m.__name__][0]} {m.__version__}' for m in (mmseg, mmcv, mmengine)), sep='|')
"""


def interpreter(version: str) -> str | None:
    """python3.X of the path, else of pyenv."""
    of_pyenv = Path(os.environ.get('PYENV_ROOT', Path.home() / '.pyenv'), 'versions')
    found = sorted(of_pyenv.glob(f'{version}.*/bin/python'))
    return shutil.which(f'python{version}') or (str(found[-1]) if found else None)


def install(name: str, row: Row, python: str) -> str:
    """The interpreter of the row's environment, which is made if it is not there whole."""
    folder = REPOSITORY / f'.venv-{name}'
    inside = str(folder / 'bin' / 'python')
    done = folder / 'installed'
    if not done.exists() or done.stat().st_mtime < (REPOSITORY / 'pyproject.toml').stat().st_mtime:
        subprocess.run([python, '-m', 'venv', str(folder)], check=True)
        for packages in row.installs:
            subprocess.run([inside, *PIP, *packages], check=True, cwd=REPOSITORY)
        done.touch()
    return inside


def test(name: str, python: str) -> tuple[str, bool]:
    """The row of the table, and whether pytest ended well and nothing failed."""
    report = REPOSITORY / f'.venv-{name}' / 'report.xml'
    report.unlink(missing_ok=True)
    status = subprocess.run([python, '-m', 'pytest', f'--junitxml={report}'], cwd=REPOSITORY).returncode
    versions = subprocess.run([python, '-c', VERSIONS], capture_output=True, text=True).stdout.splitlines()
    cells = [name, *(versions[-1].split('|') if versions else ['?'] * 6)]
    ended = f'pytest ended with status {status}'
    try:
        suite = ElementTree.parse(report).getroot().find('testsuite')
    except (FileNotFoundError, ElementTree.ParseError):
        return f'| {" | ".join(cells)} | the tests did not start, or broke off: {ended} |', False
    tests, skipped, failures, errors = (
        int(suite.get(key)) for key in ('tests', 'skipped', 'failures', 'errors')
    )
    failed = failures + errors
    result = f'{tests - failed - skipped} / {failed} / {skipped}'
    if status != (1 if failed else 0):  # 1 says that tests failed, and no more
        result += f', {ended}'
    return f'| {" | ".join(cells)} | {result} |', status == 0 and not failed


def main(names: list[str]) -> int:
    if unknown := sorted(set(names) - set(ROWS)):
        sys.exit(f'there is no row {unknown}; there are {list(ROWS)}')
    table, results = [], []
    for name in names or ROWS:
        row = ROWS[name]
        python = interpreter(row.python)
        if python is None:
            table.append(f'| {name} | left out: there is no python{row.python} | | | | | | |')
            continue
        try:
            line, passed = test(name, install(name, row, python))
        except subprocess.CalledProcessError as error:
            line, passed = f'| {name} | {shlex.join(error.cmd)} failed | | | | | | |', False
        table.append(line)
        results.append(passed)
    print('\n| row | Python | torch | NumPy | MMSegmentation | mmcv | MMEngine | passed / failed / skipped |')
    print('|---|---|---|---|---|---|---|---|', *table, sep='\n')
    return 0 if results and all(results) else 1


if __name__ == '__main__':
    sys.exit(main(sys.argv[1:]))
