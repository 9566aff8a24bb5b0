"""Compares the labels that the losses receive with those that were counted.

In the first iterations of a run the labels that arrive are added up on the device. At a few of them they are
compared with the counts that the weights come from; then the losses are left alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import mmseg_imbalance.registry  # noqa: F401  its error says how to install MMSegmentation

import numpy as np
import torch
from mmengine.dataset import DefaultSampler, InfiniteSampler
from mmengine.dist import all_reduce
from torch import Tensor
from torch.utils.data import BatchSampler, DistributedSampler, RandomSampler

from mmseg_imbalance.class_weight import WeightRecord, class_names
from mmseg_imbalance.config_fields import transforms_of
from mmseg_imbalance.logged_parts import unwrapped
from mmseg_imbalance.losses import WeightedLoss
from mmseg_imbalance.ops import SoftStats
from mmseg_imbalance.transforms import RareClassPaste

# after which iterations of a run; each waits for the device once
COMPARED_AFTER = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
PARTS = 1_000_000  # a share of an image as an integer: sums of integers are the same on any number of ranks
# See compare for what these mean. The bounds hold for the mean of independent numbers in [0, 1].
FACTOR = 100
ENOUGH_BELOW = 14
ENOUGH_ABOVE = 0.25
IN_NEARLY_ALL = 0.9
CAUSES = (
    'Usual causes: a transform after the one that loads changes labels; labels, or the code that loads them, '
    'were changed after they were counted (mmseg-imbalance cache --clear removes counts that are kept); '
    'another reduce_zero_label, label_map or order of the classes; the head ignores another label than was '
    'counted; crops or padding that leave a class out, or favour it.'
)


class Received(NamedTuple):
    """What a loss has received: C classes, pixels without their weights."""

    pixels: np.ndarray  # (C,) valid pixels
    images: np.ndarray  # (C,) images that held the class
    share: np.ndarray  # (C,) mean of its share in the valid pixels of an image
    ignored: int  # pixels
    num_images: int  # an image that came twice is two
    valid_images: int  # with a valid pixel
    of_points: bool  # points that a head has chosen, not whole crops

    @classmethod
    def from_sums(cls, sums: Sequence[int]) -> Received:
        """From the 3 C + 4 sums of a :class:`LabelCounter`."""
        pixels, images, parts = np.array(sums[:-4], dtype=np.int64).reshape(3, -1)
        ignored, num_images, valid_images, of_points = sums[-4:]
        share = parts / (PARTS * max(valid_images, 1))
        return cls(pixels, images, share, ignored, num_images, valid_images, of_points > 0)


class LabelCounter:
    """Adds up, on the device and without waiting for it, the labels that a loss receives."""

    def __init__(self) -> None:
        self.sums: Tensor | None = None  # (3 C + 4,) int64, see take

    def __call__(self, pred: Tensor, target: Tensor, stats: SoftStats, parts: Tensor) -> None:
        """Take a batch; see ``watchers`` of :class:`~mmseg_imbalance.losses.WeightedLoss`."""
        if stats.class_count is None:
            return
        count = stats.class_count.long()  # (B, C)
        valid = count.sum(1, keepdim=True)
        by_class = [count, count > 0, (PARTS * (count / valid.clamp_min(1))).long()]
        ones = torch.ones_like(valid)
        by_image = [target[0].numel() - valid, ones, valid > 0, ones * (pred.ndim == 3)]
        sums = torch.cat([x.sum(0) for x in (*by_class, *by_image)])
        self.sums = sums if self.sums is None else self.sums + sums

    def total(self, num_classes: int, device: torch.device) -> Tensor:
        """(3 C + 4,): by class pixels, images, PARTS; then ignored pixels, images, valid ones, points."""
        size = 3 * num_classes + 4
        if self.sums is None or len(self.sums) != size:  # of other classes, which the loss refuses
            return torch.zeros(size, dtype=torch.int64, device=device)
        return self.sums


class Finding(NamedTuple):
    """Where the labels that arrived do not fit the counts."""

    severity: str  # 'error', 'warning', or 'note'
    kind: str
    label: int | None
    message: str


def compare(received: Received, record: WeightRecord, *, at_random: bool = True) -> list[Finding]:
    """Hold what a loss has received against the record that its weights come from.

    An error is what cannot be: a class weighs 0 because no annotation has it, all were counted, and it
    arrives. The rest are warnings. They need evidence: N images, of which a random crop has an expected share
    e of the class, the mean of its shares in the images. With N e >= 14, a share of e / 100 or less (nothing
    too) has a probability below exp(-0.94 N e); with N e >= 1/4, one of 100 e or more has one below
    exp(-360 N e); with N >= 32 and e >= 1/2, one of e / 5 or less has one below exp(-0.32 N) (Chernoff's and
    Hoeffding's bounds). Less than that may be a crop's chance, or what augmentation does on purpose.

    Args:
        at_random: whether each image is as likely as any other. A sampler that draws by class, and
            RareClassPaste, show rare classes more often: then only classes that nearly every image holds are
            looked at.
    """
    found: list[Finding] = []
    weights = np.array(record.weights, dtype=np.float64)
    if record.pixels is None or record.images is None or not record.num_images:
        return _given_zeros(received, record, weights > 0)
    pixels, images = np.array(record.pixels), np.array(record.images)
    complete = record.num_images == record.dataset_images
    for c in np.flatnonzero((pixels == 0) & (received.pixels > 0)):
        if complete or weights[c] == 0:
            severity = 'error' if complete and weights[c] == 0 else 'warning'
            message = f'{_came(received, record, c)}; the weight of these counts is {weights[c]:g}'
            found.append(Finding(severity, 'never counted', int(c), message))
    found += _given_zeros(received, record, (weights > 0) | (pixels == 0))
    if received.of_points:
        return found

    expected = pixels / max(pixels.sum(), 1)
    if record.image_share is not None:
        expected = np.array(record.image_share)
    evidence = received.valid_images if complete else min(received.valid_images, record.num_images)
    looked_at = at_random | (images >= IN_NEARLY_ALL * record.num_images)
    share = received.share
    less = (evidence * expected >= ENOUGH_BELOW) & (share * FACTOR <= expected)
    if evidence >= 32:
        less |= (expected >= 0.5) & (share * 5 <= expected)
    more = at_random & (evidence * expected >= ENOUGH_ABOVE) & (share >= FACTOR * expected)
    for c in np.flatnonzero(less & looked_at | more):
        shares = f'a share of {share[c]:.3g}, where {expected[c]:.3g} was to be expected'
        found.append(Finding('warning', 'another share', int(c), f'{_came(received, record, c)}: {shares}'))

    arrived = received.ignored / max(received.ignored + received.pixels.sum(), 1)
    counted = 1.0 if record.ignored is None else record.ignored / (record.ignored + pixels.sum())
    if received.num_images >= 32 and arrived >= 0.9 and counted <= 0.5:
        message = (
            f'{arrived:.2%} of the pixels that arrive, in {received.num_images:,} images, are ignored '
            f'ones, but {counted:.2%} of those counted'
        )
        found.append(Finding('warning', 'ignored', None, message))
    return found


def _came(received: Received, record: WeightRecord, label: int) -> str:
    counted, images = (record.pixels or [])[label], (record.images or [])[label]
    sample = '' if record.num_images == record.dataset_images else f', a sample of {record.dataset_images:,}'
    return (
        f'class {record.classes[label]!r}, label {label}, was counted with {counted:,} pixels in '
        f'{images:,} of {record.num_images:,} images{sample}, but arrived with {received.pixels[label]:,} '
        f'pixels in {received.images[label]:,} of {received.num_images:,} images'
    )


def _given_zeros(received: Received, record: WeightRecord, right: np.ndarray) -> list[Finding]:
    """Weights of 0 that somebody has written, on purpose as a rule: a note says what they do."""
    return [
        Finding(
            'note',
            'given 0',
            int(c),
            f'class {record.classes[c]!r} weighs 0 by the class_weight given, and arrived with '
            f'{received.pixels[c]:,} of {received.pixels.sum():,} pixels: they teach nothing',
        )
        for c in np.flatnonzero(~right & (received.pixels > 0))
    ]


def drawn_at_random(loader: Any) -> bool:
    """Whether a data loader draws each image as often as any other, in random order, and pastes nothing."""
    batches = getattr(loader, 'batch_sampler', None)
    if type(batches) is not BatchSampler:
        return False
    if any(isinstance(step, RareClassPaste) for step in transforms_of(loader.dataset)):
        return False
    plain = (DefaultSampler, InfiniteSampler, RandomSampler, DistributedSampler)
    return type(batches.sampler) in plain and getattr(batches.sampler, 'shuffle', True)


class LabelCheck:
    """Compares in the first iterations of a run; :class:`~mmseg_imbalance.hooks.ClassWeightHook` calls it.

    It looks at every loss of this package that has class weights or the class frequency. What one loss of a
    head is given on purpose (PIDHead's last one sees boundaries alone) is no warning: all of a head must
    agree. Each class is warned of once.

    Args:
        runner: of MMEngine, before its first iteration.
    """

    def __init__(self, runner: Any) -> None:
        model = unwrapped(runner.model)
        self.losses: dict[str, WeightedLoss] = {
            name: loss for name, loss in model.named_modules() if isinstance(loss, WeightedLoss)
        }
        self.counters = {name: LabelCounter() for name in self.losses}
        for name, loss in self.losses.items():
            loss.watch(self.counters[name])
        self.at_random = drawn_at_random(runner.train_dataloader)
        self.iteration = 0
        self.told: set[tuple[str, int | None]] = set()

    def after_iteration(self, runner: Any) -> None:
        """Compare where it is due; every rank must call it.

        Raises:
            ValueError: what arrives cannot be what was counted; on every rank.
        """
        if not self.counters:
            return
        self.iteration += 1
        if self.iteration in COMPARED_AFTER:
            self.compare(runner)
        if self.iteration >= COMPARED_AFTER[-1]:
            self.remove()

    def remove(self) -> None:
        """Leave the losses alone."""
        for loss in self.losses.values():
            loss.unwatch(LabelCounter)
        self.counters = {}

    def compare(self, runner: Any) -> None:
        """Compare what has arrived on all ranks so far."""
        counted = runner.message_hub.get_info('class_weights')
        counted = None if counted is None else WeightRecord.from_dict(counted)
        records = {name: _record(loss, counted) for name, loss in self.losses.items()}
        records = {name: record for name, record in records.items() if record is not None}
        if not records:
            self.remove()
            return
        begun = (counter.sums.device for counter in self.counters.values() if counter.sums is not None)
        device = next(begun, torch.device('cpu'))  # the sums go to that of the ranks' backend by themselves
        totals = [self.counters[name].total(len(r.classes), device) for name, r in records.items()]
        everything = torch.cat(totals)
        all_reduce(everything)
        sums = np.split(everything.tolist(), np.cumsum([len(total) for total in totals])[:-1])
        by_head: dict[str, list[list[Finding]]] = {}
        for (name, record), each in zip(records.items(), sums, strict=True):
            received = Received.from_sums(each.tolist())
            if received.num_images:
                found = compare(received, record, at_random=self.at_random)
                named = [finding._replace(message=f'{name}: {finding.message}') for finding in found]
                by_head.setdefault(name.partition('.loss_')[0], []).append(named)
        self._tell(runner.logger, by_head)

    def _tell(self, logger: Any, by_head: dict[str, list[list[Finding]]]) -> None:
        errors: dict[tuple[str, int | None], str] = {}
        warnings: dict[tuple[str, int | None], str] = {}
        for losses in by_head.values():
            shared = set.intersection(*({(f.kind, f.label) for f in found} for found in losses))
            for severity, kind, label, message in (finding for found in losses for finding in found):
                key = kind, label
                if severity == 'error':
                    errors.setdefault(key, message)
                elif key in shared - self.told:
                    self.told.add(key)
                    if severity == 'note':
                        logger.info(message)
                    else:
                        warnings[key] = message
        if errors:
            raise ValueError(
                'what arrives in training cannot be what was counted, so the weights are wrong.\n'
                + '\n'.join([*errors.values(), CAUSES])
            )
        if warnings:
            logger.warning(
                'what arrives in training is hardly what was counted.\n'
                + '\n'.join([*warnings.values(), CAUSES])
            )


def _record(loss: WeightedLoss, counted: WeightRecord | None) -> WeightRecord | None:
    """What is known of the weights of a loss: counts, or at least the weights; the same on every rank."""
    if any(weight.by_counts for weight in loss.class_weights):
        return counted
    weight = loss.class_weight  # what a term leaves out on purpose, another may teach
    if weight.record is not None:
        return weight.record
    given = weight.given()
    if given is None:
        return None
    names = class_names() or []
    return WeightRecord(names if len(names) == len(given) else [str(c) for c in range(len(given))], given)
