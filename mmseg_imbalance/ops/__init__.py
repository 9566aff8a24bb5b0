"""The one pass over pixels that every loss of the package is computed from."""

from mmseg_imbalance.ops.soft_stats import SoftStats, soft_stats, sum_over_ranks

__all__ = ['SoftStats', 'soft_stats', 'sum_over_ranks']
