"""Where the classes of this package are registered; imports MMEngine only.

A class registered at MMEngine's root is found from every scope, so plain ``type='CombinedWeightedLoss'``
works under ``default_scope = 'mmseg'``. The empty child registries make the prefixed name resolve as well:
for ``type='mmseg_imbalance.CombinedWeightedLoss'`` MMEngine imports this module, and so the package, itself.
"""

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

__all__ = ['DATASETS', 'DATA_SAMPLERS', 'HOOKS', 'METRICS', 'MODELS', 'OPTIM_WRAPPERS', 'TRANSFORMS']

for _root in (DATA_SAMPLERS, DATASETS, HOOKS, METRICS, MODELS, OPTIM_WRAPPERS, TRANSFORMS):
    Registry(_root.name, parent=_root, scope='mmseg_imbalance')
