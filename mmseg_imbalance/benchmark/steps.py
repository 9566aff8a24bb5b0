"""Whole training steps of published configs, with MMSegmentation's head and loss and with this package's."""

import logging
from copy import deepcopy
from functools import lru_cache, partial

import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import init_default_scope
from mmengine.structures import PixelData
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from torch import nn

from mmseg_imbalance.benchmark.case import LOSS_SCALE, Case, Row, by, make_labels
from mmseg_imbalance.benchmark.formulas import ce_and_dice, over_all_pixels
from mmseg_imbalance.class_balance import ClassWatcher
from mmseg_imbalance.losses import WeightedLoss
from mmseg_imbalance.shipped import configs
from mmseg_imbalance.suite import Suite, SuiteRun, on_this_machine

STEPS = {  # MMSegmentation's config, and ours
    'segformer': (
        'segformer/segformer_mit-b0_8xb1-160k_cityscapes-1024x1024.py',
        'segformer/segformer_mit-b0-combined_8xb1-160k_cityscapes-1024x1024.py',
    ),
    'deeplabv3': (
        'deeplabv3/deeplabv3_r50-d8_4xb2-40k_cityscapes-512x1024.py',
        'deeplabv3/deeplabv3_r50-d8-combined_4xb2-40k_cityscapes-512x1024.py',
    ),
}


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
                for class_weight in module.class_weights:
                    class_weight.set_weights(weight)
                    class_weight.set_pixels(weight.cpu())  # any numbers: what they are takes no time
                if watched:
                    watcher = ClassWatcher()
                    watcher.with_gradient = True
                    module.watch(watcher)
                    self.watchers.append(watcher)
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


def step_case(name, args):
    """Training steps of a config: as MMSegmentation has it, with our loss, with our head and loss."""
    theirs, ours = (Config.fromfile(configs() / path) for path in STEPS[name])
    mixed = deepcopy(theirs)
    for head in ('decode_head', 'auxiliary_head'):
        if head in ours.model:
            mixed.model[head].loss_decode = ours.model[head].loss_decode
    data, weight, batch = make_images(theirs, args)
    gpu = args.device == 'cuda'
    amp = dict(type='AmpOptimWrapper', dtype=args.dtype) if gpu else dict(type='CPUAmpOptimWrapper')
    for cfg in (theirs, ours, mixed):
        cfg.model.pretrained = None
        cfg.model.data_preprocessor.size = batch[2:]
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
    return Case(by(*batch), f'{name} step', rows)


def suite_case(path, args):
    """The training step of each method of a suite, of its first data set; what the loader does is not in it.

    Methods whose model and losses are those of an earlier one are left out.
    """
    suite = Suite(path)
    group = suite.groups[0]
    data, models, rows = None, [], []
    for method in suite.methods:
        cfg = suite.config(SuiteRun(suite.name, group['dataset'], group['schedule'], method, 0))
        if data is None:
            init_default_scope(cfg.get('default_scope', 'mmseg'))
            data, weight, batch = make_images(cfg, args)
        cfg.model.data_preprocessor.size = batch[2:]
        if cfg.model in models:
            continue
        models.append(cfg.model)
        on_this_machine(cfg, '', 0, args.dtype == 'float32', args.device == 'cuda')
        trial = partial(StepTrial, cfg, data, weight)
        # the losses differ, so each is held against itself, made anew
        rows.append(Row(method, trial, lambda trial=trial: trial().result(), ours=bool(rows)))
    return Case(by(*batch), f'{group["dataset"]} step', rows)


def make_images(cfg, args):
    """A batch of a config's training, class weights (C,), and the size of the batch."""
    size, number = args.step_size or cfg.crop_size, cfg.train_dataloader.batch_size
    classes = cfg.model.decode_head.num_classes
    torch.manual_seed(0)
    labels, _ = make_labels((number, *size), classes, args.ignored)
    tubes = torch.randint(2, labels.shape)
    samples = [
        SegDataSample(gt_sem_seg=PixelData(data=label[None]), gt_edge_map=PixelData(data=tube[None]))
        for label, tube in zip(labels, tubes, strict=True)
    ]
    data = dict(inputs=list(torch.randint(256, (number, 3, *size), dtype=torch.uint8)), data_samples=samples)
    return data, torch.linspace(0.2, 3, classes, device=args.device), (number, 3, *size)
