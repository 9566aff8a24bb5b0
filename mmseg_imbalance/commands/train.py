"""``mmseg-imbalance train``: tools/train.py, wherever it is installed."""

from __future__ import annotations

import subprocess
import sys

from mmseg_imbalance.commands.options import need_mmsegmentation
from mmseg_imbalance.shipped import tools


def main(argv: list[str] | None = None) -> int:
    need_mmsegmentation()
    arguments = sys.argv[1:] if argv is None else argv
    return subprocess.run([sys.executable, tools() / 'train.py', *arguments]).returncode
