"""Counting the classes of a data set, from its annotations alone.

`training` finds what a run trains on; `counts` counts a data set on all ranks. docs/architecture.md lists the
other modules.
"""

from mmseg_imbalance.counting.cache import default_cache_dir
from mmseg_imbalance.counting.counts import check_counting, count_classes
from mmseg_imbalance.counting.training import training_frequency

__all__ = ['check_counting', 'count_classes', 'default_cache_dir', 'training_frequency']
