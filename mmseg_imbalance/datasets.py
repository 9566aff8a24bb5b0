"""Data sets that MMSegmentation lacks."""

from collections.abc import Sequence

from mmseg_imbalance.registry import DATASETS

from mmseg.datasets import BaseSegDataset


@DATASETS.register_module()
class CamVidDataset(BaseSegDataset):
    """CamVid with 11 classes: images/SPLIT/NAME.jpg and annotations/SPLIT/NAME.png (uint8, 0..11).

    Label 11, unlabelled, becomes 255 when an annotation is loaded, which heads and metrics ignore
    by default. Source: Brostow, Fauqueur, Cipolla, "Semantic object classes in video", 2009, with
    the classes and colours of the SegNet tutorial.
    """

    METAINFO = {
        'classes': (
            'sky', 'building', 'pole', 'road', 'pavement', 'tree', 'sign symbol', 'fence', 'car',
            'pedestrian', 'bicyclist',
        ),
        'palette': [
            [128, 128, 128], [128, 0, 0], [192, 192, 128], [128, 64, 128], [60, 40, 222],
            [128, 128, 0], [192, 128, 128], [64, 64, 128], [64, 0, 128], [64, 64, 0], [0, 128, 192],
        ],
    }  # fmt: skip

    @classmethod
    def get_label_map(cls, new_classes: Sequence[str] | None = None) -> dict[int, int]:
        """Old to new label: MMSegmentation's map of chosen classes, if any, and 11 to 255."""
        return {**(super().get_label_map(new_classes) or {}), len(cls.METAINFO['classes']): 255}
