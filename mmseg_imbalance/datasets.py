"""Data sets that MMSegmentation lacks: CamVid, and any whose labels are merged into fewer classes."""

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


@DATASETS.register_module()
class MergedClassDataset(BaseSegDataset):
    """Labels of several classes taken as one, such as all defects against the background.

    Args:
        classes_of_labels: the name of the class of each label in the files, from label 0 on:
            ``['background', 'defect', 'defect']``. Several labels of one name are one class. The classes are
            in the order in which they appear here. With ``reduce_zero_label`` these are the reduced labels. A
            label without a name stays as it is, and training refuses it; 255 stays ignored.
        **kwargs: of MMSegmentation's BaseSegDataset. ``metainfo=dict(classes=...)`` chooses among the merged
            classes, or changes their order; the others are ignored, 255.

    Raises:
        ValueError: no names, or ``metainfo`` has a class that no label is of.
    """

    def __init__(self, classes_of_labels: Sequence[str], **kwargs: object) -> None:
        names = classes_of_labels
        if isinstance(names, str) or not names or not all(isinstance(name, str) for name in names):
            raise ValueError(
                f'classes_of_labels={names!r}, allowed are class names, one for each label in the files, as '
                "['background', 'defect', 'defect']"
            )
        self.classes_of_labels = list(names)
        metainfo = dict(classes=tuple(dict.fromkeys(names))) | dict(kwargs.pop('metainfo', None) or {})
        super().__init__(metainfo=metainfo, **kwargs)

    def get_label_map(self, new_classes: Sequence[str]) -> dict[int, int]:
        """Label in the files to label of the merged classes."""
        if unknown := sorted(set(new_classes) - set(self.classes_of_labels)):
            raise ValueError(f'no label is of {unknown}; classes_of_labels has {self.classes_of_labels}')
        numbers = {name: number for number, name in enumerate(new_classes)}
        return {label: numbers.get(name, 255) for label, name in enumerate(self.classes_of_labels)}
