"""Where the classes of this package are registered; whatever registers one needs MMSegmentation.

A class registered at MMEngine's root is found from every scope, so plain ``type='CombinedWeightedLoss'``
works under ``default_scope = 'mmseg'``. The empty child registries make the prefixed name resolve as well:
for ``type='mmseg_imbalance.CombinedWeightedLoss'`` MMEngine imports this module, and so the package, itself.
"""

try:
    import mmseg.registry  # noqa: F401
    from mmengine.registry import (
        DATA_SAMPLERS,
        DATASETS,
        HOOKS,
        METRICS,
        MODELS,
        OPTIM_WRAPPERS,
        TRANSFORMS,
        Registry,
    )
except ImportError as error:
    raise ImportError(
        'mmseg_imbalance extends MMSegmentation, which cannot be imported here '
        f'({error}). Install one of the two stacks: '
        "pip install 'mmseg-imbalance[onedl]' (maintained fork, plain pip) or "
        "pip install 'mmseg-imbalance[openmmlab]' (upstream; builds mmcv)."
    ) from error

__all__ = ['DATASETS', 'DATA_SAMPLERS', 'HOOKS', 'METRICS', 'MODELS', 'OPTIM_WRAPPERS', 'TRANSFORMS']

for _root in (DATA_SAMPLERS, DATASETS, HOOKS, METRICS, MODELS, OPTIM_WRAPPERS, TRANSFORMS):
    # the locations: else MMEngine looks for modules of its naming, and warns
    Registry(_root.name, parent=_root, scope='mmseg_imbalance', locations=['mmseg_imbalance.registry'])
