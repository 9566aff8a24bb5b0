"""What tells one training, one test and one model from another."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.config import Config

from mmseg_imbalance.config_fields import get_field, innermost, type_name

# settings of any depth that say where and how a run was carried out, not what was trained
ELSEWHERE = {
    'cache_dir', 'custom_imports', 'data_root', 'default_hooks', 'default_scope', 'env_cfg',
    'experiment_name', 'launcher', 'log_level', 'log_processor', 'model_wrapper_cfg', 'num_workers',
    'persistent_workers', 'pin_memory', 'randomness', 'resume', 'val_interval', 'vis_backends', 'visualizer',
    'work_dir',
}  # fmt: skip
AFTER_TRAINING = re.compile('(test|val|tta)_')  # where these names begin
# hooks that look on
WATCHING = {
    'CheckpointHook', 'ClassBalanceHook', 'EmptyCacheHook', 'IterTimerHook', 'LoggerHook', 'NPUProfilerHook',
    'PredictionHook', 'ProfilerHook', 'ResumeSamplerHook', 'RunHook', 'RuntimeInfoHook',
    'SegVisualizationHook', 'SubclassVisualizationHook',
}  # fmt: skip
# hooks that change what a test predicts
DECIDING = {'DecisionHook', 'LogitAdjustmentHook'}
# options of a metric that leave the IoU of each class as it is
MORE_NUMBERS = {
    'beta', 'blocks', 'collect_device', 'collect_dir', 'format_only', 'groups', 'iou_metrics', 'keep_results',
    'object_areas', 'output_dir', 'prefix', 'quantiles',
}  # fmt: skip


OF_RUN = ('processes', 'training data', 'tested data', 'checkpoint')  # settings that no config holds


def settings(config: Config, split: str, tested: Config | None = None) -> dict[str, object]:
    """What is trained and, on a split, tested, by KEY.KEY: equal for runs that differ in the seed alone.

    Args:
        config: of the training.
        split: 'val' or 'test'.
        tested: config of the test; None: the same.
    """
    tested = config if tested is None else tested
    model, wrappers = unwrapped(tested)
    evaluated = dict(
        mode=dict(model.get('test_cfg') or {}),
        wrappers=[{key: value for key, value in each.items() if key != 'module'} for each in wrappers],
        hooks=deciding_hooks(tested),
        dataset=(tested.get(f'{split}_dataloader') or {}).get('dataset'),
        evaluator=[
            {key: value for key, value in metric.items() if key not in MORE_NUMBERS}
            for metric in _evaluators(tested, split)
        ],
    )
    trained = config.to_dict()
    trained['model'], _ = unwrapped(trained)
    if 'custom_hooks' in trained:
        trained['custom_hooks'] = [hook for hook in _hooks(config) if type_name(hook) not in WATCHING]
    return dict(_flatten(trained, '')) | dict(_flatten(evaluated, 'evaluation'))


def unwrapped(config: Mapping[str, Any]) -> tuple[Mapping[str, Any], list[Mapping[str, Any]]]:
    """The model of a config, and what is around it, such as test time augmentation."""
    model, wrappers = config.get('model') or {}, []
    while 'module' in model:
        wrappers.append(model)
        model = model['module']
    return model, wrappers


def _evaluators(config: Config, split: str) -> list:
    found = config.get(f'{split}_evaluator') or []
    return [found] if isinstance(found, dict) else found


def _hooks(config: Config) -> list:
    return list(config.get('custom_hooks') or ())


def deciding_hooks(config: Config) -> list:
    """The hooks that change what a test predicts."""
    return [hook for hook in _hooks(config) if type_name(hook) in DECIDING]


def has_hook(config: Config, name: str) -> bool:
    return any(type_name(hook) == name for hook in _hooks(config))


def _flatten(node: object, key: str) -> Iterator[tuple[str, object]]:
    if isinstance(node, dict):
        names = [(str(name), value) for name, value in node.items()]
        items = [(k, v) for k, v in names if k not in ELSEWHERE and not AFTER_TRAINING.match(k)]
    elif isinstance(node, list | tuple):
        items = [(str(index), value) for index, value in enumerate(node)]
    else:
        if node is not None:
            yield key, node
        return
    for name, value in items:
        yield from _flatten(value, f'{key}.{name}'.lstrip('.'))


def data_roots(dataset: object) -> list[str]:
    """The folders of a data set and of those that it wraps."""
    roots = {get_field(each, 'data_root') for each in innermost(dataset)}
    return sorted(str(root) for root in roots if root is not None)


def training_data(config: Config, class_pixels: dict[str, int]) -> str:
    """Which data were trained on: by the pixels of each class, as folders have other names elsewhere."""
    if class_pixels:
        return f'counts {_digest(repr(sorted(class_pixels.items())).encode())}'
    return ', '.join(data_roots((config.get('train_dataloader') or {}).get('dataset')))


def tested_data(tested: Config, split: str, scores: dict | None) -> str:
    """Which data were tested on: by the images and the pixels of their labels, where these are known."""
    if scores is not None:
        content = (
            '\n'.join(scores['images'].tolist()).encode() + np.ascontiguousarray(scores['label']).tobytes()
        )
        return f'{len(scores["images"])} images {_digest(content)}'
    return _place(tested, split)


def shown_data(tested: Config, split: str, scores: dict | None) -> str:
    """What was tested on and by which metric, in words."""
    names = [type_name(metric) for metric in _evaluators(tested, split)]
    known = [] if scores is None else [tested_data(tested, split, scores)]
    return ', '.join(filter(None, [_place(tested, split), *known, *names])) or '-'


def _place(tested: Config, split: str) -> str:
    """Folder and part of the tested data set, without the path to the folder."""
    dataset = (tested.get(f'{split}_dataloader') or {}).get('dataset') or {}
    while isinstance(dataset.get('dataset'), dict):
        dataset = dataset['dataset']
    where = dataset.get('ann_file') or (dataset.get('data_prefix') or {}).get('img_path') or ''
    root = Path(str(dataset.get('data_root') or '')).name
    more = [f'{key} {dataset[key]}' for key in ('indices', 'ignore_index') if dataset.get(key) is not None]
    return ', '.join(filter(None, ['/'.join(filter(None, [root, str(where)])), *more]))


def model_names(home: Path | None, session: Path, checkpoint: str) -> frozenset[str]:
    """Names of a tested model: two work dirs that share one are of the same model.

    Args:
        home: of its training, a TIMESTAMP folder; None: not known.
        session: of its test, a TIMESTAMP folder.
        checkpoint: path that was tested; if it is relative, nobody knows to what.
    """
    path = Path(checkpoint)
    if home is not None:  # a copy of the work dir has the same log
        files = [home / 'vis_data' / name for name in ('config.py', 'scalars.json')]
        log = b''.join(file.read_bytes() for file in files if file.exists())
        return frozenset({f'{home.parent.resolve() / path.name}', f'{_digest(log, 32)} {path.name}'})
    if not path.is_absolute():  # on two machines it is two models: look beside the test
        above = (folder / path for folder in session.resolve().parents)
        path = next((each for each in above if each.parent.is_dir()), session / path)
    return frozenset({str(path.resolve())})


def evaluated_at(checkpoint: str, end: int | None, unit: str) -> tuple[str, str]:
    """What of a training a checkpoint is; and a note where it is not its end.

    Returns:
        'end', 'best KEY', 'iter 1000', each with ', bias' behind it for a file ``bias_*`` as of fit-bias; or
        the name of a file that MMEngine would not name so.
    """
    stem = re.sub(r'-[0-9a-f]{8}$', '', Path(checkpoint).stem)  # of published ones
    if bias := re.fullmatch(r'bias(?:_(.+))?', stem):
        what, note = evaluated_at(bias[1] or 'latest', end, unit)
        return f'{what}, bias', note or f'{stem} is a model with a bias that was fitted after training'
    if best := re.fullmatch(r'best_(.+)_(iter|epoch)_(\d+)', stem):
        key, of, number = best.groups()
        return f'best {key}', (
            f'{stem} is the best checkpoint by {key} on the validation images, after {number} {of}s'
        )
    at = re.fullmatch(r'(iter|epoch)_(\d+)', stem)
    in_other_unit = at is not None and at[1] != unit  # nobody knows how many of these the training has
    if end is None or in_other_unit or stem in ('latest', f'{unit}_{end}'):
        return 'end', ''
    if at is None:
        return stem, f'nobody knows at which {unit} {stem} was saved: it is compared as a config of its own'
    return f'{unit} {at[2]}', f'evaluated after {at[2]} of {end} {unit}s'


def _digest(content: bytes, length: int = 6) -> str:
    return hashlib.sha256(content).hexdigest()[:length]
