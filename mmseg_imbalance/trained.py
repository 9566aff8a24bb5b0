"""Trained models: load one, ask what it believes, and change its classifier."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable

from mmseg_imbalance.registry import DATASETS, MODELS

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.device import get_device
from mmengine.logging import MessageHub
from mmengine.runner.checkpoint import CheckpointLoader
from mmseg.models.losses import CrossEntropyLoss
from torch import Tensor, nn
from torch.utils.data import Dataset

from mmseg_imbalance.class_weight import ClassWeight, WeightRecord
from mmseg_imbalance.config_fields import innermost, type_name
from mmseg_imbalance.ignored_label import give_ignored_label, label_of_evaluation
from mmseg_imbalance.losses import WeightedLoss
from mmseg_imbalance.subclass import NLLSum
from mmseg_imbalance.terms import CrossEntropy
from mmseg_imbalance.weighting import log_prior, scheduled_weights


def load_segmentor(
    cfg: Config, config: str, checkpoint_path: str | os.PathLike[str]
) -> tuple[nn.Module, dict]:
    """The model of a checkpoint in evaluation mode, on the GPU where there is one, and the checkpoint.

    Args:
        cfg: the config, read.
        config: its path, for errors.

    Raises:
        ValueError: the checkpoint is not of this config.
    """
    try:
        model = MODELS.build(cfg.model)
    except KeyError as error:  # a type that is not registered, whose text a KeyError shows in quotes
        raise ValueError(f'{config} has a model that cannot be built: {error.args[0]}') from error
    model = model.to(get_device()).eval()
    give_ignored_label(model, label_of_evaluation(cfg))
    checkpoint = CheckpointLoader.load_checkpoint(os.fspath(checkpoint_path), map_location='cpu')
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get('state_dict'), dict):
        raise ValueError(
            f"{checkpoint_path} holds no 'state_dict'; take a checkpoint as MMEngine writes it while training"
        )
    expected, found = model.state_dict(), checkpoint['state_dict']
    wrong = [name for name, x in expected.items() if name not in found or found[name].shape != x.shape]
    if wrong:
        raise ValueError(
            f'{checkpoint_path} is not of {config}: {len(wrong)} of {len(expected)} tensors are '
            f'missing in it or have another shape, such as {wrong[0]}'
        )
    model.load_state_dict(found, strict=False)
    return model, checkpoint


def classifying_head(model: nn.Module, wanted_by: str) -> nn.Module:
    """The last decode head of a model, whose ``conv_seg`` makes the logits that are tested.

    Args:
        wanted_by: who needs these logits, for the error.

    Raises:
        TypeError: it has no ``conv_seg``.
    """
    while hasattr(model, 'module'):  # wrappers of DDP and of test time augmentation
        model = model.module
    head = getattr(model, 'decode_head', None)
    head = head[-1] if isinstance(head, nn.ModuleList) else head
    if not isinstance(getattr(head, 'conv_seg', None), nn.Module):
        raise TypeError(
            f'{wanted_by} needs the logits of a conv_seg, which {type(head).__name__} of '
            f'{type(model).__name__} does not have; most heads derived from BaseDecodeHead do'
        )
    return head


def belief_offset(cfg: Config, head: nn.Module, checkpoint: dict) -> np.ndarray:
    """What added to the logits of a head makes their softmax the probabilities that it believes in, (C,).

    Cross-entropy with weights w_c is lowest where the softmax is w_c p_c over its sum: -ln w_c takes them
    back. With logit adjustment tau it is lowest where the softmax of z_c + tau ln f_c is p. The weights are
    those of the last iteration before the checkpoint. Losses and terms with a factor of 0 do not count. A
    region loss has no such closed form, and recall weighs anew in each batch: both are left as they are.

    Args:
        cfg: the config of the training.
        head: with its losses.
        checkpoint: where what :class:`~mmseg_imbalance.hooks.ClassWeightHook` has counted is kept.

    Raises:
        ValueError: the losses have weights 'auto' or the prior, which the checkpoint does not say; or several
            cross-entropies have different ones, of which there is no single softmax.
    """
    classes = max(head.num_classes, 2)
    found = [
        _offset_of(cfg, loss, checkpoint, classes)
        for loss in _losses(head)
        if getattr(loss, 'loss_weight', 1) != 0 and _has_cross_entropy(loss)
    ]
    if not found:
        return np.zeros(classes)
    offset, weighed = found[0]
    for other, counted in found[1:]:
        # up to a constant, which changes no softmax
        if (weighed != counted).any() or np.ptp((other - offset)[weighed]) > 1e-6:
            raise ValueError(
                'the cross-entropies of the head have different class weights or logit adjustments; what the '
                'model believes in is known where they have the same ones, or where only one has a '
                'loss_weight above 0'
            )
    return offset


def _has_cross_entropy(loss: nn.Module) -> bool:
    return (
        bool(_cross_entropies(loss)) if isinstance(loss, WeightedLoss) else isinstance(loss, CrossEntropyLoss)
    )


def _cross_entropies(loss: WeightedLoss) -> list[str]:
    """The names of the terms that are one, and that count."""
    kinds = CrossEntropy | NLLSum
    return [name for name, term in loss.terms.items() if isinstance(term, kinds) and loss.factors[name] > 0]


def _offset_of(cfg: Config, loss: nn.Module, checkpoint: dict, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """That of one cross-entropy, (C,), and which classes have a weight above 0; others are not known."""
    offset = np.zeros(classes)
    if isinstance(loss, WeightedLoss):
        weights = _last_weights(cfg, loss.class_weight_of[_cross_entropies(loss)[0]], checkpoint)
        if loss.logit_adjustment > 0:
            offset += loss.logit_adjustment * log_prior(_record(checkpoint).pixels)
    else:  # MMSegmentation's own
        weights = loss.class_weight
    given = np.ones(classes) if weights is None else np.asarray(weights, dtype=np.float64)
    offset -= np.log(given, out=np.zeros(classes), where=given > 0)
    return offset, given > 0


def _losses(head: nn.Module) -> list[nn.Module]:
    losses = getattr(head, 'loss_decode', None)
    return list(losses) if isinstance(losses, nn.ModuleList) else [losses]


def _last_weights(
    cfg: Config, class_weight: ClassWeight, checkpoint: dict
) -> list[float] | np.ndarray | None:
    if not class_weight.auto:
        return class_weight.given()
    weights = _record(checkpoint).weights
    for hook in cfg.get('custom_hooks') or ():
        if 'ClassWeightHook' in type_name(hook) and hook.get('power_schedule') is not None:
            info = checkpoint['message_hub']['runtime_info']
            if not {'iter', 'max_iters'} <= set(info):
                raise ValueError(
                    'the checkpoint does not say how far its training was, on which the weights of a '
                    'power_schedule depend: it was trained without the RuntimeInfoHook of the default hooks'
                )
            progress = info['iter'] / info['max_iters']
            return scheduled_weights(weights, hook['power_schedule'], progress)
    return weights


def _record(checkpoint: dict) -> WeightRecord:
    record = checkpoint.get('message_hub', {}).get('runtime_info', {}).get('class_weights')
    if record is None:
        raise ValueError(
            'the checkpoint does not say which class weights it was trained with: it was published or '
            'changed. Take the one that the training wrote, or give the file of the weights: --cfg-options '
            'model.decode_head.loss_decode.class_weight=WORK_DIR/class_weights.json'
        )
    return WeightRecord.from_dict(record)


def split_with_test_pipeline(cfg: Config, split: str) -> list[Dataset]:
    """The data sets of a split, those inside wrappers one by one, with images as they are tested.

    Args:
        split: 'train', 'val' or 'test'.

    Raises:
        ValueError: the config has no such split, or none that is tested.
    """
    tested = cfg.get('test_dataloader') or cfg.get('val_dataloader')
    loader = cfg.get(f'{split}_dataloader')
    if loader is None or tested is None:
        raise ValueError(f'the config has no {split}_dataloader, or none to test with')
    pipeline = next(innermost(tested.dataset)).get('pipeline')
    found = []
    for dataset in innermost(loader.dataset):
        dataset = dataset.copy()
        if split == 'train':
            dataset.pipeline = pipeline
        found.append(DATASETS.build(dataset))
    # from where losses know the classes that a class_weight by name means
    MessageHub.get_current_instance().update_info('dataset_meta', found[0].metainfo)
    return found


@torch.no_grad()
def sampled_logits(
    model: nn.Module, datasets: Iterable[Dataset], images: int, most: int = 2**18
) -> tuple[Tensor, int]:
    """Logits (N, C) of pixels on a grid in some images, as the model is tested on them, and how many images.

    A single output channel becomes the two logits [0, z].

    Args:
        datasets: their images are drawn at random, the same ones each time.
        images: at most so many.
        most: pixels, fewer where there are more than 16 classes.
    """
    places = [(dataset, index) for dataset in datasets for index in range(len(dataset))]
    chosen = torch.randperm(len(places), generator=torch.Generator().manual_seed(0))[:images].tolist()
    found = []
    for dataset, index in (places[place] for place in chosen):
        (sample,) = model.test_step(pseudo_collate([dataset[index]]))
        logits = sample.seg_logits.data
        if len(logits) == 1:  # MMSegmentation hands out its sigmoid
            p = logits.float().clamp(1e-7, 1 - 1e-7)
            logits = torch.cat([torch.zeros_like(p), (p / (1 - p)).log()])
        pixels = most / len(chosen) * min(1, 16 / len(logits))
        step = max(1, math.ceil((logits.shape[1] * logits.shape[2] / pixels) ** 0.5))
        found.append(logits[:, step // 2 :: step, step // 2 :: step].flatten(1).T.float())
    return torch.cat(found), len(chosen)
