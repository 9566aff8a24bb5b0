"""Commands as a user runs them: as processes."""

import os
import subprocess
import sys
from pathlib import Path

from conftest import REPOSITORY


def run(*command, cwd=REPOSITORY, **env):
    """Exit status and output."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=os.environ | dict(PATH=f'{Path(sys.executable).parent}:{os.environ["PATH"]}') | env,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    return done.returncode, done.stdout


def succeed(*command, **options):
    code, output = run(*command, **options)
    assert code == 0, output[-4000:]
    return output
