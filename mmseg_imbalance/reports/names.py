"""Names of configs that a reader understands: what was trained, not what the file is called."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from mmseg_imbalance.config_fields import type_name
from mmseg_imbalance.ignored_label import decode_heads
from mmseg_imbalance.reports.work_dirs import Run

USUAL_SAMPLERS = ('InfiniteSampler', 'DefaultSampler')  # each image as often as any other
FEW = 2  # settings that a name has room for


def readable_names(groups: Mapping[str, Sequence[Run]]) -> list[str]:
    """A name for each config: its losses, its sampler, and what else it takes to tell it from the others.

    ``CrossEntropyLoss`` is cross-entropy; other losses keep their names. Where two configs would have the
    same name, it says what differs: what the test adds, else one or two settings, else a part of the name of
    the config. Configs whose losses are not known have a part of their own name.

    Args:
        groups: the runs of each config by its full name; no two are the same.
    """
    runs = [members[0] for members in groups.values()]
    short = short_names(list(groups))
    names = [_method(run) or name for run, name in zip(runs, short, strict=True)]
    for tell in (_added_by_test, _differing, None):
        for name in set(names):
            same = [n for n, other in enumerate(names) if other == name]
            if len(same) > 1:
                added = [f' ({short[n]})' for n in same] if tell is None else tell([runs[n] for n in same])
                for n, text in zip(same, added, strict=True):
                    names[n] += text
    return names if len(set(names)) == len(names) else short


def _method(run: Run) -> str | None:
    """The losses of the last decode head and the sampler."""
    heads = decode_heads(run.config.get('model') or {})
    losses = heads[-1].get('loss_decode') if heads and isinstance(heads[-1], dict) else None
    losses = losses if isinstance(losses, list | tuple) else [losses] if losses else []
    steps = [_loss(loss) for loss in losses]
    if not steps or None in steps:
        return None
    sampler = type_name((run.config.get('train_dataloader') or {}).get('sampler') or {})
    if sampler and sampler not in USUAL_SAMPLERS:
        steps.append(sampler)
    return ' + '.join(dict.fromkeys(steps))


def _loss(loss: Mapping) -> str | None:
    name = type_name(loss)
    if name == 'CrossEntropyLoss':
        return 'cross-entropy' if loss.get('class_weight') is None else 'weighted cross-entropy'
    return name or None


def _added_by_test(runs: Sequence[Run]) -> list[str]:
    """What the test adds to the model's own prediction, such as logit adjustment."""
    return [''.join(f', {what}' for what in run.source.split(', ')[1:]) for run in runs]


def _differing(runs: Sequence[Run]) -> list[str]:
    """The settings that differ, of the loss alone if others do too; nothing where they are many.

    Of settings that say the same, as those of the schedule and the length of the training, one is told.
    """
    keys = sorted({key for run in runs for key in run.settings})
    values = {key: tuple(repr(run.settings.get(key)) for run in runs) for key in keys}
    differing = sorted({told: key for key, told in values.items() if len(set(told)) > 1}.values())
    if len(differing) > FEW:
        trained = [key for key in differing if not key.startswith(('custom_hooks', 'evaluation'))]
        alone = len(trained) <= FEW and all('loss_decode' in key for key in trained)
        differing = trained if alone else []
    return [
        ''.join(f', {_last(key)}={run.settings[key]}' for key in differing if key in run.settings)
        for run in runs
    ]


def _last(key: str) -> str:
    """The end of a KEY.0.KEY that says most: a number alone says nothing."""
    return re.search(r'[^.]+(\.\d+)*$', key)[0]


def short_names(names: list[str]) -> list[str]:
    """Names of configs without what all of them begin and end with, but for one word: they stay distinct."""
    if len(names) < 2:
        return names
    words = [re.split('(?=[_-])', name) for name in names]
    shortest = min(map(len, words))
    same = [len({word[n] for word in words}) == 1 for n in range(shortest)]
    start = max(0, (same.index(False) if False in same else shortest) - 1)
    end = 0
    while end < shortest - start - 1 and len({word[-1 - end] for word in words}) == 1:
        end += 1
    return [''.join(word[start : len(word) - end]).lstrip('_-') for word in words]
