"""Class-balanced training for MMSegmentation; importing the package registers all it offers.

Where MMSegmentation is absent the torch core is there: ops, functional, terms, frequency, weighting,
clustering. The other names then raise the error of :mod:`mmseg_imbalance.registry`: it says what to install.
"""

from mmseg_imbalance.class_weight import ClassWeight, WeightRecord
from mmseg_imbalance.clustering import SubclassClustering, SubclassTable
from mmseg_imbalance.frequency import CITYSCAPES_TRAIN, ClassFrequency
from mmseg_imbalance.ops import SoftStats, similarity_weight, soft_stats
from mmseg_imbalance.terms import CrossEntropy, Overlap, SkeletonRecall
from mmseg_imbalance.version import __version__
from mmseg_imbalance.weighting import SCHEMES, class_weights

try:
    from mmseg_imbalance import registry  # noqa: F401
except ImportError as error:
    _missing = str(error)

    def __getattr__(name: str) -> object:
        if name in __all__:
            raise ImportError(_missing)
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')

else:
    from mmseg_imbalance import compat  # noqa: F401
    from mmseg_imbalance.backbones import EfficientNetLite0
    from mmseg_imbalance.class_balance import ClassBalanceHook
    from mmseg_imbalance.counting import count_classes, training_frequency
    from mmseg_imbalance.datasets import CamVidDataset, MergedClassDataset
    from mmseg_imbalance.decisions import DecisionHook, LogitAdjustmentHook
    from mmseg_imbalance.hardness import HardnessWeightedLoss
    from mmseg_imbalance.heads import (
        FeatureASPPHead,
        FeatureDepthwiseSeparableASPPHead,
        FeatureHead,
        FeatureSegformerHead,
    )
    from mmseg_imbalance.hooks import ClassWeightHook, SubclassVisualizationHook
    from mmseg_imbalance.losses import (
        CombinedWeightedLoss,
        GeneralizedDiceLoss,
        WeightedCrossEntropyLoss,
        WeightedDiceLoss,
        WeightedFocalLoss,
        WeightedJaccardLoss,
        WeightedLoss,
        WeightedTverskyLoss,
    )
    from mmseg_imbalance.metrics import ClassIoUMetric, ImbalanceIoUMetric
    from mmseg_imbalance.predictions import PredictionHook
    from mmseg_imbalance.queries import QueryClassLoss
    from mmseg_imbalance.recall import RecallWeightedLoss
    from mmseg_imbalance.resunet import ResUNet
    from mmseg_imbalance.run_hook import RunHook
    from mmseg_imbalance.samplers import RareClassSampler
    from mmseg_imbalance.skeleton import SkeletonRecallLoss, SkeletonTubes
    from mmseg_imbalance.subclass import SimilaritySubclassifiedLoss, SubclassifiedLoss
    from mmseg_imbalance.transforms import RareClassCrop, RareClassPaste

__all__ = [
    'CITYSCAPES_TRAIN',
    'SCHEMES',
    'CamVidDataset',
    'ClassBalanceHook',
    'ClassFrequency',
    'ClassIoUMetric',
    'ClassWeight',
    'ClassWeightHook',
    'CombinedWeightedLoss',
    'CrossEntropy',
    'DecisionHook',
    'EfficientNetLite0',
    'FeatureASPPHead',
    'FeatureDepthwiseSeparableASPPHead',
    'FeatureHead',
    'FeatureSegformerHead',
    'GeneralizedDiceLoss',
    'HardnessWeightedLoss',
    'ImbalanceIoUMetric',
    'LogitAdjustmentHook',
    'MergedClassDataset',
    'Overlap',
    'PredictionHook',
    'QueryClassLoss',
    'RareClassCrop',
    'RareClassPaste',
    'RareClassSampler',
    'RecallWeightedLoss',
    'ResUNet',
    'RunHook',
    'SimilaritySubclassifiedLoss',
    'SkeletonRecall',
    'SkeletonRecallLoss',
    'SkeletonTubes',
    'SoftStats',
    'SubclassClustering',
    'SubclassTable',
    'SubclassVisualizationHook',
    'SubclassifiedLoss',
    'WeightRecord',
    'WeightedCrossEntropyLoss',
    'WeightedDiceLoss',
    'WeightedFocalLoss',
    'WeightedJaccardLoss',
    'WeightedLoss',
    'WeightedTverskyLoss',
    '__version__',
    'class_weights',
    'count_classes',
    'similarity_weight',
    'soft_stats',
    'training_frequency',
]
