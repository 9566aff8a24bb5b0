"""Class-balanced training for MMSegmentation; importing the package registers all it offers."""

try:
    import mmseg.registry  # noqa: F401
except ImportError as error:
    raise ImportError(
        'mmseg_imbalance extends MMSegmentation, which cannot be imported here '
        f'({error}). Install one of the two stacks: '
        "pip install 'mmseg-imbalance[onedl]' (maintained fork, plain pip) or "
        "pip install 'mmseg-imbalance[openmmlab]' (upstream; builds mmcv)."
    ) from error

from mmseg_imbalance import (  # noqa: F401
    class_balance,
    compat,
    components,
    datasets,
    heads,
    hooks,
    losses,
    metrics,
    samplers,
    subclass,
)
from mmseg_imbalance.version import __version__

__all__ = ['__version__']
