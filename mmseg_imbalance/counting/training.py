"""The class frequency of what a run trains on: one way for hooks, sampler, metric and commands."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mmseg_imbalance.config_fields import get_field, type_name
from mmseg_imbalance.counting.cache import default_cache_dir
from mmseg_imbalance.counting.counts import count_classes
from mmseg_imbalance.counting.dataset_parts import initialising
from mmseg_imbalance.counting.ranks import attempt, exchange, warn
from mmseg_imbalance.frequency import ClassFrequency
from mmseg_imbalance.ignored_label import current_config, decode_heads, ignored_label


def training_frequency(
    source: Any = None,
    *,
    heads: Iterable[Any] | None = None,
    max_images: int | None = None,
    num_workers: int | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    per_image: bool = False,
    progress: bool = True,
    label_transforms: Sequence[str] | None = None,
) -> ClassFrequency:
    """The class frequency of the training annotations; every user of this package gets it here.

    All ranks must call it, and all get the same or raise the same.

    The label that is no class is what the data set or the decode heads say, see
    :func:`~mmseg_imbalance.ignored_label.ignored_label`.

    The counts are kept in one folder: `cache_dir`, else the `cache_dir` of a ClassWeightHook among the
    `custom_hooks` of the config, else the environment variable MMSEG_IMBALANCE_CACHE, else
    ``~/.cache/mmseg_imbalance``. Without a home folder they are not kept. `label_transforms` too are those of
    that hook where none are given here.

    Args:
        source: a runner in training; a config, whose training data set is built; a data set (neither model
            nor config is known then); None: the config of the runner that was made last.
        heads: those whose ``ignore_index`` counts; None: the decode heads of the model.
        num_workers: worker processes of each rank; None: as many as the train_dataloader has.
        max_images, per_image, progress, label_transforms: see :func:`count_classes`.

    Raises:
        ValueError: there is no runner, or no train_dataloader; data set and heads ignore different labels; or
            as :func:`count_classes`.
        FileNotFoundError: the data set or an annotation is not there.
    """

    def find() -> tuple[Any, int, Path | None, int | None, Sequence[str] | None]:
        dataset, config, model, workers = _training_data(source)
        label = ignored_label(dataset, decode_heads(model) if heads is None else heads)
        hook = hook_of(config)
        folder = cache_dir or get_field(hook, 'cache_dir') or _users_folder() or None
        workers = workers if num_workers is None else num_workers
        names = get_field(hook, 'label_transforms') if label_transforms is None else label_transforms
        path = None if folder is None else Path(folder)
        return dataset, label, path, workers, names

    found, failure = attempt(find)
    exchange(failure, None)  # nobody starts to count unless all can
    dataset, ignore_index, folder, workers, names = found or (None,) * 5
    return count_classes(
        dataset,
        max_images=max_images,
        ignore_index=ignore_index,
        num_workers=workers,
        cache_dir=folder,
        progress=progress,
        per_image=per_image,
        label_transforms=names,
    )


def _users_folder() -> Path | None:
    try:
        return default_cache_dir()
    except RuntimeError as error:
        warn(f'class counts are not cached, {error}')
        return None


def _training_data(source: Any) -> tuple[Any, Any, Any, int | None]:
    """The training data set, config, model and number of workers of `source`; None what is not known."""
    from mmseg_imbalance.registry import DATASETS

    from mmengine.config import Config
    from mmengine.registry import DefaultScope

    if source is None and (source := current_config()) is None:
        raise ValueError('there is no runner, and so no config that names the training data')
    if isinstance(source, Config | dict):
        loader = source.get('train_dataloader')
        if loader is None:
            raise ValueError(
                'the training annotations are counted, but the config has no train_dataloader; add one, only '
                'its dataset is used'
            )
        scope = source.get('default_scope', 'mmseg')
        with initialising(), DefaultScope.overwrite_default_scope(scope):
            dataset = DATASETS.build(loader['dataset'])
        return dataset, source, source.get('model'), loader.get('num_workers')
    if hasattr(source, 'train_dataloader'):  # a runner
        loader = source.train_dataloader
        return loader.dataset, source.cfg, source.model, getattr(loader, 'num_workers', None)
    return source, None, None, None


def hook_of(config: Any) -> Any:
    """The ClassWeightHook among the ``custom_hooks`` of a config, its dict or made already; None without."""
    for hook in (config.get('custom_hooks') or ()) if config is not None else ():
        if type_name(hook) == 'ClassWeightHook':
            return hook
    return None
