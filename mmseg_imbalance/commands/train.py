"""``mmseg-imbalance train``: tools/train.py, wherever it is installed."""

from __future__ import annotations

from mmseg_imbalance.commands.options import run_tool


def main(argv: list[str] | None = None) -> int:
    return run_tool('train', argv)
