"""What touches pixels: the one pass that every loss is computed from, and the weights by similarity."""

from mmseg_imbalance.ops.similarity import similarity_weight
from mmseg_imbalance.ops.soft_stats import SoftStats, soft_stats, sum_over_ranks

__all__ = ['SoftStats', 'similarity_weight', 'soft_stats', 'sum_over_ranks']
