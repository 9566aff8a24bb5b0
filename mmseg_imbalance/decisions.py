"""What is done between the logits and the labels of a trained model, when it is tested.

The order is always this one, whatever the order of these two hooks in a config:

1. :class:`LogitAdjustmentHook` shifts the logits, in the head.
2. MMSegmentation joins sliding windows, resizes the logits to the labels and averages the probabilities of
   test time augmentation.
3. :class:`DecisionHook` makes labels of them: the most probable class of each pixel, or what RankSEG chooses.
4. It gives small regions to the class around them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence

from mmseg_imbalance.registry import HOOKS

import torch
from mmengine.hooks import Hook
from mmengine.model import BaseTTAModel
from mmseg.models import SegTTAModel
from mmseg.structures import SegDataSample
from torch import Tensor, nn

from mmseg_imbalance.components import remove_small
from mmseg_imbalance.counting import check_counting, training_frequency
from mmseg_imbalance.ignored_label import decode_heads
from mmseg_imbalance.logged_parts import unwrapped
from mmseg_imbalance.losses import WeightedLoss
from mmseg_imbalance.options import check_choice, check_whole
from mmseg_imbalance.trained import classifying_head
from mmseg_imbalance.weighting import log_prior

RULES = ('argmax', 'rankseg-iou', 'rankseg-dice')


@HOOKS.register_module()
class LogitAdjustmentHook(Hook):
    """Adjust the logits at test time, of a model that was trained without logit adjustment: z_c - tau ln f_c.

    f_c is the share of class c in the training annotations, counted or taken from the cache as
    :class:`~mmseg_imbalance.hooks.ClassWeightHook` does. tau ln f_c is subtracted from what the ``conv_seg``
    of the last decode head returns. Resizing, sliding windows and test time augmentation come after that.

    Args:
        tau: 0 changes nothing, 1 is the source's.
        cache_dir, max_images, num_workers, label_transforms: see
            :class:`~mmseg_imbalance.hooks.ClassWeightHook`.

    Source: Menon et al. 2021, https://arxiv.org/abs/2007.07314, equation 9.
    """

    def __init__(
        self,
        tau: float = 1.0,
        cache_dir: str | os.PathLike[str] | None = None,
        max_images: int | None = None,
        num_workers: int | None = None,
        label_transforms: Sequence[str] | None = None,
    ) -> None:
        if not math.isfinite(tau):
            raise ValueError(f'tau must be a finite number, got {tau}')
        check_counting(max_images, num_workers)
        self.tau = tau
        self.handle = None
        self.cache_dir = cache_dir
        self.max_images = max_images
        self.num_workers = num_workers
        self.label_transforms = label_transforms

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        if self.tau != 0:
            _warn_of_class_bias(runner, checkpoint, f'LogitAdjustmentHook with tau={self.tau}')

    def before_test(self, runner) -> None:
        head = classifying_head(runner.model, 'LogitAdjustmentHook')
        for name, loss in runner.model.named_modules():
            if isinstance(loss, WeightedLoss) and loss.logit_adjustment > 0:
                runner.logger.warning(
                    f'{name} was trained with logit_adjustment={loss.logit_adjustment} already; '
                    f'tau={self.tau} at test time comes on top of it'
                )
        frequency = training_frequency(
            runner.cfg,  # a runner that tests has no data set of training
            heads=decode_heads(runner.model),
            max_images=self.max_images,
            num_workers=self.num_workers,
            cache_dir=self.cache_dir,
            label_transforms=self.label_transforms,
        )
        if frequency.unmet.any():
            unmet = [name for name, found in zip(frequency.classes, frequency.unmet, strict=True) if found]
            runner.logger.warning(
                f'classes that were not met in {frequency.num_images} of {frequency.dataset_images} images '
                f'are taken for as rare as the rarest that was: {", ".join(unmet)}. A larger max_images '
                'tells more.'
            )
        shift = self.tau * torch.from_numpy(log_prior(frequency.pixels)).float()
        if len(shift) != head.num_classes:
            raise ValueError(
                f'the training data have {len(shift)} classes, {list(frequency.classes)}, but '
                f'{type(head).__name__} predicts {head.num_classes}'
            )
        if head.out_channels == 1:  # the logit of class 1 against class 0
            shift = shift[1:] - shift[:1]
        self._remove()  # of a test that ended in an error
        self.calls = 0

        def subtract(module, args, logits):
            self.calls += 1
            return logits - shift.to(logits)[:, None, None]

        self.handle = head.conv_seg.register_forward_hook(subtract)
        runner.logger.info(f'LogitAdjustmentHook: {self.tau} * ln f_c is subtracted from the logits')

    def _remove(self) -> None:
        if self.handle is not None:
            self.handle.remove()
            self.handle = None

    def after_test(self, runner) -> None:
        self._remove()
        if not self.calls:
            raise RuntimeError(
                'LogitAdjustmentHook changed nothing: the last decode head does not call its conv_seg'
            )


@HOOKS.register_module()
class DecisionHook(Hook):
    """Make the labels of a test in another way than by the most probable class of each pixel.

    RankSEG takes for each class the set of pixels whose expected IoU or Dice is the highest in the image. A
    pixel that several sets hold, or none, goes to the class that gains most by it. It believes the
    probabilities, and counts ignored pixels like others, since it knows no labels. A class without a pixel
    above 0.5 has no set. With a single output channel the classes 0 and 1 have the probabilities 1 - p and p;
    the ``threshold`` of the head has no effect then.

    Of several such hooks each acts on the labels of the one before; RankSEG makes them anew from the logits.

    Args:
        rule: 'argmax' keeps what the model predicts; 'rankseg-iou' and 'rankseg-dice' are RankSEG.
        remove_small: connected components of fewer pixels, of the label size, go to the class around them,
            see :func:`~mmseg_imbalance.components.remove_small`; 1 removes none.

    Raises:
        ValueError: an option out of its range.
        ImportError: RankSEG is not installed.
        TypeError: before the test; RankSEG of a head whose logits are not those of a ``conv_seg``.

    Source: Dai & Li, RankSEG, JMLR 24 (2023), https://arxiv.org/abs/2206.13086; Wang & Dai, RankSEG-RMA,
    NeurIPS 2025, whose solver this is.
    """

    def __init__(self, rule: str = 'argmax', remove_small: int = 1) -> None:
        check_choice('rule', rule, RULES)
        check_whole(1, remove_small=remove_small)
        self.rule = rule
        self.remove_small = remove_small
        self.rank = None if rule == 'argmax' else _rankseg(rule)

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        if self.rank is not None:
            _warn_of_class_bias(runner, checkpoint, self.rule)

    def before_test(self, runner) -> None:
        if self.rank is not None:
            classifying_head(runner.model, self.rule)
        model = unwrapped(runner.model)
        augmented = isinstance(model, BaseTTAModel)
        # what the loop calls; with augmentation the only place that sees all views of an image
        self.model, self.method = (model, 'merge_preds') if augmented else (runner.model, 'test_step')
        predict = getattr(self.model, self.method)

        def decided(data: object) -> list[SegDataSample]:
            samples = predict(data)
            views = data if augmented else [[sample] for sample in samples]
            for sample, seen in zip(samples, views, strict=True):
                self._decide(sample, seen)
            return samples

        setattr(self.model, self.method, decided)

    def after_test(self, runner) -> None:
        vars(self.model).pop(self.method, None)  # the method of the class is there again

    def _decide(self, sample: SegDataSample, views: Iterable[SegDataSample]) -> None:
        predicted = sample.pred_sem_seg.data  # (1, H, W); of one output channel in the dtype of the logits
        labels = predicted if self.rank is None else self.rank(_probabilities(views)[None])
        if self.remove_small > 1:
            labels = torch.from_numpy(remove_small(labels[0].long().cpu().numpy(), self.remove_small))[None]
        sample.pred_sem_seg.data = labels.to(predicted)


def mend_merged_threshold(model: nn.Module) -> None:
    """Let test time augmentation of a single output channel hold the mean probability against the threshold.

    MMSegmentation's takes the sigmoid of each view a second time: all is above 0.5 then.

    Args:
        model: as a runner has it; others than MMSegmentation's with such a head are left alone.
    """
    model = unwrapped(model)
    merging = getattr(type(model), 'merge_preds', None)
    if merging is not SegTTAModel.merge_preds or model.module.out_channels > 1:
        return
    merge, threshold = model.merge_preds, model.module.decode_head.threshold

    def mended(views_of_images: list[list[SegDataSample]]) -> list[SegDataSample]:
        samples = merge(views_of_images)
        for sample, views in zip(samples, views_of_images, strict=True):
            labels = _probabilities(views)[1:] > threshold
            sample.pred_sem_seg.data = labels.to(sample.pred_sem_seg.data)
        return samples

    model.merge_preds = mended


def _warn_of_class_bias(runner, checkpoint: dict, what: str) -> None:
    if 'class_bias' in (checkpoint.get('meta') or {}):
        runner.logger.warning(
            f'{what} comes on top of the class bias that fit-bias has written into this checkpoint; test the '
            'one that the training wrote'
        )


def _probabilities(views: Iterable[SegDataSample]) -> Tensor:
    """(C, H, W) float32 of an image, the mean over its views."""
    found = []
    for view in views:
        logits = view.seg_logits.data.float()
        # of a single channel MMSegmentation hands out the sigmoid
        found.append(torch.cat([1 - logits, logits]) if len(logits) == 1 else logits.softmax(0))
    return sum(found) / len(found)


def _rankseg(rule: str):
    try:
        from rankseg import RankSEG
    except ImportError as error:
        raise ImportError(
            f"the rule {rule!r} needs the package rankseg: pip install 'mmseg-imbalance[rankseg]'"
        ) from error
    return RankSEG(metric=rule.removeprefix('rankseg-'), solver='RMA', output_mode='multiclass')
