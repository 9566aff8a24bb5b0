"""Where the classes of this package are registered; imports MMEngine only.

A class registered at MMEngine's root is found from every scope, so plain ``type='CombinedWeightedLoss'``
works under ``default_scope = 'mmseg'``. The empty child registries make the prefixed name resolve as well:
for ``type='mmseg_imbalance.CombinedWeightedLoss'`` MMEngine imports this module, and so the package, itself.
"""

from mmengine.registry import DATASETS, HOOKS, METRICS, MODELS, OPTIM_WRAPPERS, Registry

__all__ = ['DATASETS', 'HOOKS', 'METRICS', 'MODELS', 'OPTIM_WRAPPERS']

for _root in (DATASETS, HOOKS, METRICS, MODELS, OPTIM_WRAPPERS):
    Registry(_root.name, parent=_root, scope='mmseg_imbalance')
