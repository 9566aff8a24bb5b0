"""What touches pixels: the one pass that every loss is computed from, and the weights by similarity."""

from mmseg_imbalance.ops.contract import (
    SoftStats,
    gather_from_ranks,
    rank_and_number,
    sum_over_ranks,
    valid_pixels,
)
from mmseg_imbalance.ops.similarity import similarity_weight
from mmseg_imbalance.ops.soft_stats import check_arguments, choose_backend, soft_stats

__all__ = [
    'SoftStats',
    'check_arguments',
    'choose_backend',
    'gather_from_ranks',
    'rank_and_number',
    'similarity_weight',
    'soft_stats',
    'sum_over_ranks',
    'valid_pixels',
]
