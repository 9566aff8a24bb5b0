"""Evaluation that keeps the IoU of each class, which a long tail is about."""

from collections.abc import Sequence

from mmseg.evaluation import IoUMetric

from mmseg_imbalance.registry import METRICS


@METRICS.register_module()
class ClassIoUMetric(IoUMetric):
    """The framework's IoUMetric, which also returns the IoU of each class, so that logs and files hold it.

    Adds ``IoU.NAME`` in per cent for every class that occurs in the labels or predictions; all arguments are
    those of IoUMetric.
    """

    def compute_metrics(self, results: Sequence[tuple]) -> dict[str, float]:
        metrics = super().compute_metrics(results)
        if self.format_only:
            return metrics
        intersection, union = (sum(areas) for areas in list(zip(*results, strict=True))[:2])
        for name, i, u in zip(self.dataset_meta['classes'], intersection, union, strict=True):
            if u > 0:
                metrics[f'IoU.{name}'] = round(100 * float(i / u), 2)
        return metrics
