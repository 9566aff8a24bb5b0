"""The configs and scripts that come with the package, in a checkout and after ``pip install``."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).parent


def configs() -> Path:
    """The folder of the configs."""
    return _shipped('configs')


def tools() -> Path:
    """The folder of train.py, test.py and dist_train.sh."""
    return _shipped('tools')


def is_checkout() -> bool:
    """Whether the package is used from a checkout of its repository."""
    return not (PACKAGE / '.mim').exists()


def _shipped(name: str) -> Path:
    # a wheel holds them where OpenMMLab's mim looks for them
    folder = PACKAGE.parent / name if is_checkout() else PACKAGE / '.mim' / name
    if not folder.is_dir():
        raise FileNotFoundError(
            f'{folder} is missing, a folder that comes with mmseg-imbalance; install the package again'
        )
    return folder
