"""What benchmark_losses.py compares: each loss or training step beside the formula that it is held to.

The formulas are plain PyTorch, as one would write them down, and run in double. Another library's loss is
held to what its own documentation says, which need not be this package's Dice; a note says what differs.
"""

import logging
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.structures import PixelData
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from torch import nn

from mmseg_imbalance.class_balance import ClassWatcher
from mmseg_imbalance.losses import CombinedWeightedLoss, WeightedCrossEntropyLoss, WeightedLoss
from mmseg_imbalance.ops import similarity_weight
from mmseg_imbalance.subclass import SubclassifiedLoss

IGNORED = 255
LOSS_SCALE = 4096  # the gradient of a mean over a million pixels would vanish in float16
CONFIGS = Path(__file__).parents[1] / 'configs'
CHANNELS, SUBCLASSES = 512, 3  # of the features that are clustered
STEPS = {  # the framework's config, and ours
    'segformer': (
        'segformer/segformer_mit-b0_8xb1-160k_cityscapes-1024x1024.py',
        'segformer/segformer_mit-b0-combined_8xb1-160k_cityscapes-1024x1024.py',
    ),
    'deeplabv3': (
        'deeplabv3/deeplabv3_r50-d8_4xb2-40k_cityscapes-512x1024.py',
        'deeplabv3/deeplabv3_r50-d8-combined_4xb2-40k_cityscapes-512x1024.py',
    ),
}


@dataclass(eq=False)
class Row:
    """A line of the table; a trial's ``run`` is what is measured, its ``result`` is value and gradient."""

    name: str
    make_trial: Callable
    truth: Callable | None = None  # the result by the formula; None: the trial's own
    note: str = ''
    ours: bool = False
    trial: 'LossTrial | StepTrial | None' = None
    skipped: str | None = None  # why
    off_by: float | None = None
    right: bool = False
    seconds: list[float] = field(default_factory=list)  # by round
    peak: int | None = None  # bytes


@dataclass(eq=False)
class Case:
    """Rows on one batch; the first is what the others are compared with."""

    batch: str  # BxCxHxW
    logits: str
    rows: list[Row]
    least_bytes: int | None = None  # that forward and backward move, where no resize is in between


class LossTrial:
    """Forward and backward of one loss(logits, target)."""

    def __init__(self, loss, logits, target):
        self.loss, self.logits, self.target = loss, logits, target

    def run(self):
        (LOSS_SCALE * self.loss(self.logits, self.target)).backward()
        self.logits.grad = None

    def result(self):
        value = LOSS_SCALE * self.loss(self.logits, self.target)
        return [value.detach(), *torch.autograd.grad(value, self.logits)]


class StepTrial:
    """A step of MMEngine's training; a formula, where given, replaces the heads' losses.

    Watched, it is one in which ClassBalanceHook reports: most of what the hook can cost.
    """

    def __init__(self, cfg, data, weight, formula=None, watched=False):
        torch.manual_seed(0)
        # not init_weights, which may load a pretrained backbone
        self.model = revert_sync_batchnorm(MODELS.build(cfg.model)).to(weight.device)
        logging.disable(logging.INFO)  # it lists the settings of every parameter
        self.optimizer = build_optim_wrapper(self.model, cfg.optim_wrapper)
        logging.disable(logging.NOTSET)
        self.data, self.watchers = data, []
        for module in list(self.model.modules()):
            if isinstance(module, WeightedLoss):
                module.class_weight.set_weights(weight)
                if watched:
                    module.watcher = ClassWatcher()
                    module.watcher.with_gradient = True
                    self.watchers.append(module.watcher)
            if formula and hasattr(module, 'loss_decode'):
                module.loss_decode = FormulaLoss(formula, weight, module.loss_decode.loss_weight)

    def run(self):
        self.model.train_step(self.data, self.optimizer)
        for watcher in self.watchers:
            watcher.take(watcher.sums.shape[1], watcher.sums.device).tolist()

    def result(self):
        gradients = []

        def keep(module, inputs, logits):
            logits.register_hook(gradients.append)

        handle = self.model.decode_head.conv_seg.register_forward_hook(keep)
        torch.manual_seed(0)  # of dropout
        with self.optimizer.optim_context(self.model):
            losses = self.model(**self.model.data_preprocessor(self.data, True), mode='loss')
        value, _ = self.model.parse_losses(losses)
        (LOSS_SCALE * value).backward()
        self.model.zero_grad()
        handle.remove()
        return [value.detach(), *gradients]


class FormulaLoss(nn.Module):
    """A formula as a decode head calls it."""

    loss_name = 'loss'

    def __init__(self, formula, weight, loss_weight):
        super().__init__()
        self.formula, self.weight, self.loss_weight = formula, weight, loss_weight

    def forward(self, logits, target, **kwargs):
        return self.loss_weight * self.formula(logits.double(), target, self.weight)


def full_size(logits, target):
    """Logits as other losses want them: at label size, in float32 or better."""
    if logits.shape[2:] != target.shape[1:]:
        logits = F.interpolate(logits, target.shape[1:], mode='bilinear', align_corners=False)
    return logits if logits.dtype == torch.float64 else logits.float()


def cross_entropy(logits, target, weight):
    logits = full_size(logits, target)
    return F.cross_entropy(logits, target, weight.to(logits), ignore_index=IGNORED)


def with_dice(dice):
    """0.6 * F.cross_entropy + 0.4 * dice, on logits that are resized once."""

    def loss(logits, target, weight):
        logits, weight = full_size(logits, target), weight.to(logits)
        region = dice(logits, target, weight)  # first: the other order holds more at its peak
        return 0.6 * cross_entropy(logits, target, weight) + 0.4 * region

    return loss


def overlap(logits, target):
    """Intersection, prediction and truth over the valid pixels, (B, C) each."""
    valid = target[:, None] != IGNORED
    # scattered, since F.one_hot makes a tensor of int64, twice the size, on the way
    truth = torch.zeros_like(logits).scatter_(1, torch.where(valid, target[:, None], 0), valid.to(logits))
    p = logits.softmax(1) * valid
    return (p * truth).sum((2, 3)), p.sum((2, 3)), truth.sum((2, 3))


@with_dice
def ce_and_dice(logits, target, weight):
    i, p, t = overlap(logits, target)
    return ((1 - (2 * i + 1) / (p + t + 1)) @ weight / weight.sum()).mean()


@with_dice
def ce_and_dice_of_batch(logits, target, weight):
    i, p, t = (x.sum(0) for x in overlap(logits, target))
    return ((1 - (2 * i + 1) / (p + t + 1)) * (t > 0)) @ weight / weight.sum()


@with_dice
def ce_and_dice_of_present(logits, target, weight):
    i, p, t = overlap(logits, target)
    weight = weight * (t > 0)
    return ((1 - 2 * i / (p + t + 1e-8)) * weight).sum(1).div(weight.sum(1)).mean()


def ce_and_pooled_dice(logits, target, weight):
    logits = full_size(logits, target)
    p, valid = logits.softmax(1), target != IGNORED
    i = (p.gather(1, torch.where(valid, target, 0)[:, None])[:, 0] * valid).sum((1, 2))
    dice = 2 * i / (p.square().sum((1, 2, 3)) + valid.sum((1, 2)) + 2e-3)
    return 0.6 * F.cross_entropy(logits, target, ignore_index=IGNORED) + 0.4 * (1 - dice).mean()


def framework(weight):
    ce = MODELS.build(dict(type='mmseg.CrossEntropyLoss', avg_non_ignore=True))
    dice = MODELS.build(dict(type='mmseg.DiceLoss', use_sigmoid=False))

    def loss(logits, target):
        logits = full_size(logits, target)
        return 0.6 * ce(logits, target, ignore_index=IGNORED) + 0.4 * dice(logits, target)

    return loss


def monai(weight):
    from monai.losses import DiceLoss

    # its mean over the classes does not divide by the weights
    options = dict(softmax=True, to_onehot_y=True, smooth_nr=1, smooth_dr=1, ignore_index=IGNORED)
    dice = DiceLoss(weight=weight / weight.mean(), **options)
    return partial(with_dice(lambda logits, target, _: dice(logits, target[:, None])), weight=weight)


def smp(weight):
    from segmentation_models_pytorch.losses import DiceLoss

    dice = DiceLoss('multiclass', smooth=0.5, ignore_index=IGNORED, class_weights=weight)
    return partial(with_dice(lambda logits, target, _: dice(logits, target)), weight=weight)


def kornia(weight):
    from kornia.losses import DiceLoss

    dice = DiceLoss('macro', weight=weight, ignore_index=IGNORED)
    return partial(with_dice(lambda logits, target, _: dice(logits, target)), weight=weight)


def compiled(weight):
    torch.compiler.reset()  # else the limit on recompilations would count the other sizes too
    return torch.compile(CombinedWeightedLoss(class_weight=weight.tolist(), backend='eager'), dynamic=False)


# neighbours share a formula, whose result is kept for the next row
COMPETITORS = [
    ('torch.compile of ours, eager', compiled, ce_and_dice, ''),
    (
        'MONAI DiceLoss + CE',
        monai,
        ce_and_dice,
        f'its DiceCELoss is the same sum but takes no label {IGNORED}',
    ),
    ('SMP DiceLoss + CE', smp, ce_and_dice_of_batch, 'Dice of the whole batch; absent classes count as 0'),
    ('kornia DiceLoss + CE', kornia, ce_and_dice_of_present, 'no smoothing; absent classes left out'),
    (
        'framework CE + DiceLoss',
        framework,
        ce_and_pooled_dice,
        'Dice over pooled classes and ignored pixels; no weights',
    ),
]


def by(*sizes):
    return 'x'.join(map(str, sizes))


def make_labels(shape, classes, ignored):
    """(B, H, W) in blocks of 16x16 pixels, and the blocks, (B, 1, H / 16, W / 16)."""
    batch, height, width = shape
    blocks = torch.randint(classes, (batch, 1, max(1, height // 16), max(1, width // 16)))
    blocks = torch.where(torch.rand(blocks.shape) < ignored, IGNORED, blocks).float()
    return F.interpolate(blocks, (height, width))[:, 0].long(), blocks


def make_batch(shape, classes, scale, args):
    """Logits (B, C, h, w) that are mostly right, and labels (B, H, W)."""
    torch.manual_seed(0)
    target, blocks = make_labels(shape, classes, args.ignored)
    seen = F.interpolate(blocks, [round(n / scale) for n in shape[1:]]).to(args.device)
    logits = 2 * torch.randn(shape[0], classes, *seen.shape[2:], device=args.device)
    logits += 5 * (seen == torch.arange(classes, device=args.device)[:, None, None])
    return logits.to(getattr(torch, args.dtype)).requires_grad_(), target.to(args.device)


def loss_case(shape, classes, scale, args):
    """The losses on (B, H, W) labels and logits that are ``scale`` times smaller."""
    logits, target = make_batch(shape, classes, scale, args)
    weight = torch.linspace(0.2, 3, classes, device=args.device)

    @lru_cache(maxsize=1)
    def truth(formula):
        double = logits.detach().double().requires_grad_()
        return LossTrial(partial(formula, weight=weight), double, target).result()

    def row(name, make_loss, formula, note='', ours=False):
        def make_trial():
            return LossTrial(make_loss(weight), logits, target)

        return Row(name, make_trial, partial(truth, formula), note, ours)

    def in_torch(formula):
        return lambda weight: partial(formula, weight=weight)

    def of_this_package(backend):
        return lambda weight: CombinedWeightedLoss(class_weight=weight.tolist(), backend=backend)

    full = logits.shape[2:] == target.shape[1:]
    prefix = '' if full else 'resize + '
    rows = [
        row(f'{prefix}F.cross_entropy', in_torch(cross_entropy), cross_entropy),
        row(f'{prefix}CE + Dice in torch', in_torch(ce_and_dice), ce_and_dice),
        *(row(f'ours, {name}', of_this_package(name), ce_and_dice, ours=True) for name in args.backend),
        *(row(*competitor) for competitor in COMPETITORS if args.competitors),
    ]
    # read in forward and again in backward, which writes the gradient
    least = 3 * logits.nbytes + 2 * target.nbytes if full else None
    return Case(by(shape[0], classes, *shape[1:]), by(*logits.shape[2:]), rows, least)


def weighted_mean(logits, target, weight, pixel_weight):
    """Cross-entropy in which a pixel of weight k is k pixels."""
    loss = F.cross_entropy(
        full_size(logits, target), target, weight.to(logits), ignore_index=IGNORED, reduction='none'
    )
    valid = target != IGNORED
    return (loss * pixel_weight).sum() / (weight[target.where(valid, 0)] * valid * pixel_weight).sum()


def cluster_weight(loss, features, target):
    """What the state of a loss makes of each pixel, from the distances of all cells to all centroids."""
    state = loss.weighting
    cells = features.double().movedim(1, 3).flatten(1, 2)  # (B, h w, D)
    away = torch.cdist(cells, state.centroid.double().flatten(0, 1)).unflatten(2, state.pixels.shape)
    nearest = away.argmin(3).mT.unflatten(2, features.shape[2:])  # (B, C, h, w)
    label = target.where(target != IGNORED, 0)[:, None]
    full = F.interpolate(nearest.float(), target.shape[1:]).gather(1, label).long()
    return state.table().weight.nan_to_num(1)[label, full][:, 0].double()


def similarity_by_definition(logits, target, threshold=0.98):
    """The weights of :func:`~mmseg_imbalance.ops.similarity_weight`, every query with every key."""
    maps = []
    for z, y in zip(logits.split(1), target[:, None, None].float().split(1), strict=True):
        grids = [[n // stride for n in y.shape[-2:]] for stride in (4, 8)]
        q, k = (F.interpolate(full_size(z, y[0, 0]), grid, mode='bilinear')[0].flatten(1) for grid in grids)
        q_label, k_label = (F.interpolate(y[0], grid).flatten() for grid in grids)
        count = []
        for vectors, labels in zip(q.T.split(1024), q_label.split(1024), strict=True):
            longest = torch.maximum(vectors.square().sum(1)[:, None], k.square().sum(0))
            similar = (vectors @ k / (longest + 1e-5) > threshold) & (labels[:, None] == k_label)
            count.append(similar.sum(1))
        known = (q_label != IGNORED).to(z)
        both = torch.stack([known / (torch.cat(count) + 10).sqrt(), known]).view(1, 2, *grids[0])
        weight, known = F.interpolate(both, y.shape[-2:], mode='bilinear')[0]
        inside = (y[0, 0, 0] != IGNORED) & (known > 0)
        weight = weight / known.where(inside, 1)
        maps.append(torch.where(inside, weight / weight[inside].mean(), 1).clamp(max=10))
    return torch.stack(maps)


class SubclassTrial(LossTrial):
    """A subclassified loss beside its formula with the weights that its state gives before the step."""

    def __init__(self, loss, pixel_weight, logits, target, weight):
        super().__init__(loss, logits, target)
        self.pixel_weight, self.weight = pixel_weight, weight

    def result(self):
        return self.in_classes(super().result())

    def truth(self):
        double = self.logits.detach().double().requires_grad_()
        formula = partial(weighted_mean, weight=self.weight, pixel_weight=self.pixel_weight())
        return self.in_classes(LossTrial(formula, double, self.target).result())

    def in_classes(self, result):
        # a similarity within rounding of the threshold turns out either way, so that pixels may differ
        value, gradient = result
        return value, gradient.double().square().sum((0, 2, 3)).sqrt()


@dataclass(eq=False)
class WeightTrial:
    """The weights of one image alone, which have no gradient, or the matrix product in them."""

    run: Callable
    result: Callable
    truth: Callable


def subclass_case(shape, classes, scale, args):
    """SubclassifiedLoss in its modes beside WeightedCrossEntropyLoss from the same logits."""
    logits, target = make_batch(shape, classes, scale, args)
    weight = torch.linspace(0.2, 3, classes, device=args.device)
    features = torch.randn(len(logits), CHANNELS, *logits.shape[2:], device=args.device).to(logits.dtype)

    def clusters(rule):
        loss = SubclassifiedLoss(
            weight.tolist(),
            num_subclasses=SUBCLASSES,
            update=rule,
            update_freq=1,
            warmup_iters=0,
            ramp_iters=1,
        )
        call = partial(loss, features=features)
        for _ in range(2):  # centroids, then weights
            call(logits, target)
        loss.weighting.update_freq = 100
        return SubclassTrial(call, partial(cluster_weight, loss, features, target), logits, target, weight)

    def similar():
        loss = SubclassifiedLoss(weight.tolist(), mode='similarity')
        by_definition = partial(similarity_by_definition, logits.detach().double(), target)
        return SubclassTrial(loss, by_definition, logits, target, weight)

    def plain():
        ones = partial(torch.ones, target.shape, dtype=torch.float64, device=args.device)
        return SubclassTrial(WeightedCrossEntropyLoss(weight.tolist()), ones, logits, target, weight)

    size = f'{SUBCLASSES} subclasses, features {by(*features.shape)}, {features.nbytes / 1e6:.3g} MB'
    rows = [
        Row('WeightedCrossEntropyLoss', plain, ours=True),
        *(
            Row(f'clusters, {rule}', partial(clusters, rule), note=size, ours=True)
            for rule in ('ema', 'kmeans')
        ),
        Row('similarity', similar, ours=True),
    ]
    return Case(by(shape[0], classes, *shape[1:]), f'{by(*logits.shape[2:])} subclass', rows)


def similarity_case(shape, classes, scale, args):
    """The similarity weights of one image beside the product of all its queries and keys."""
    size = shape[1:]
    logits, target = make_batch((1, *size), classes, scale, args)
    logits = logits.detach()
    q, k = (torch.randn(size[0] // n * (size[1] // n), classes, device=args.device) for n in (4, 8))

    def product():
        for rows in q.split(512):  # the whole matrix would be 1 GB and slower
            rows @ k.T

    def nothing():
        return [torch.ones(1)]

    def weights():
        return [similarity_weight(logits, target).double().square().mean((1, 2))]

    def by_definition():
        return [similarity_by_definition(logits.double(), target).square().mean((1, 2))]

    rows = [
        Row('matrix product alone', partial(WeightTrial, product, nothing, nothing)),
        Row('similarity weights', partial(WeightTrial, weights, weights, by_definition), ours=True),
    ]
    return Case(by(1, classes, *size), f'{by(*logits.shape[2:])} similarity', rows)


def over_all_pixels(logits, target, weight):
    """The framework's cross-entropy: ignored pixels count in the mean."""
    return F.cross_entropy(logits, target, ignore_index=IGNORED, reduction='none').mean()


def step_case(name, args):
    """Training steps of a config: as the framework has it, with our loss, with our head and loss."""
    theirs, ours = (Config.fromfile(CONFIGS / path) for path in STEPS[name])
    mixed = deepcopy(theirs)
    for head in ('decode_head', 'auxiliary_head'):
        if head in ours.model:
            mixed.model[head].loss_decode = ours.model[head].loss_decode
    size, batch = args.step_size or theirs.crop_size, theirs.train_dataloader.batch_size
    torch.manual_seed(0)
    labels, _ = make_labels((batch, *size), theirs.model.decode_head.num_classes, args.ignored)
    data = dict(
        inputs=list(torch.randint(256, (batch, 3, *size), dtype=torch.uint8)),
        data_samples=[SegDataSample(gt_sem_seg=PixelData(data=label[None])) for label in labels],
    )
    weight = torch.linspace(0.2, 3, theirs.model.decode_head.num_classes, device=args.device)
    gpu = args.device == 'cuda'
    amp = dict(type='AmpOptimWrapper', dtype=args.dtype) if gpu else dict(type='CPUAmpOptimWrapper')
    for cfg in (theirs, ours, mixed):
        cfg.model.pretrained = None
        cfg.model.data_preprocessor.size = tuple(size)
        cfg.optim_wrapper.update({} if args.dtype == 'float32' else amp)

    @lru_cache(maxsize=1)
    def truth(formula):
        return StepTrial(theirs, data, weight, formula).result()

    def row(name, cfg, formula, ours=True, watched=False):
        trial = partial(StepTrial, cfg, data, weight, watched=watched)
        return Row(name, trial, partial(truth, formula), ours=ours)

    rows = [
        row('framework head, CE', theirs, over_all_pixels, ours=False),
        row('framework head, our CE + Dice', mixed, ce_and_dice),
        row('Feature head, our CE + Dice', ours, ce_and_dice),
        row('the same, watched by ClassBalanceHook', ours, ce_and_dice, watched=True),
    ]
    return Case(by(batch, 3, *size), f'{name} step', rows)
