"""What training and testing left in a work dir, read back."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from mmengine.config import Config

from mmseg_imbalance.metrics import load_image_scores

# settings of any depth that say where and how a run was carried out, not what was trained
ELSEWHERE = {
    'custom_imports', 'data_root', 'default_hooks', 'default_scope', 'env_cfg', 'experiment_name', 'launcher',
    'load_from', 'log_level', 'log_processor', 'model_wrapper_cfg', 'num_workers', 'persistent_workers',
    'pin_memory', 'randomness', 'resume', 'val_interval', 'vis_backends', 'visualizer', 'work_dir',
}  # fmt: skip
AFTER_TRAINING = re.compile('(test|val|tta)_')  # where these names begin


class Unusable(Exception):
    """A work dir cannot take part in a comparison."""

    @property
    def reason(self) -> str:
        return str(self)


@dataclass
class Run:
    """One trained and evaluated model."""

    work_dir: Path
    name: str  # of the config
    config: Config
    metrics: dict[str, float]
    source: str  # of the metrics
    scores: dict | None = None  # rows of every image, see mmseg_imbalance.metrics.load_image_scores
    class_pixels: dict[str, int] = field(default_factory=dict)  # of the training data, where known
    iterations: int | None = None
    seconds: float | None = None  # in training iterations, validation not included
    memory: float | None = None  # MB at the peak, as logged on GPUs
    hardware: str | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def seed(self) -> int | None:
        return (self.config.get('randomness') or {}).get('seed')

    @property
    def classes(self) -> list[str]:
        if self.class_pixels:
            return list(self.class_pixels)
        return list(self.iou)

    @property
    def iou(self) -> dict[str, float]:
        """IoU of each class in per cent; of one that neither occurs nor is predicted NaN, or nothing."""
        if self.scores is None:
            return {k.removeprefix('IoU.'): v for k, v in self.metrics.items() if k.startswith('IoU.')}
        union, intersect = (self.scores[key].sum(0) for key in ('union', 'intersect'))
        with np.errstate(invalid='ignore'):
            iou = 100 * intersect / union
        return dict(zip(self.scores['classes'].tolist(), iou.tolist(), strict=True))


def settings(config: Config) -> dict[str, object]:
    """What a config trains and how, by KEY.KEY: equal for runs that differ in the seed alone."""
    flat: dict[str, object] = {}
    _flatten(config.to_dict(), '', flat)
    return flat


def _flatten(node: object, key: str, flat: dict[str, object]) -> None:
    if isinstance(node, dict):
        items = [(k, v) for k, v in node.items() if k not in ELSEWHERE and not AFTER_TRAINING.match(k)]
    elif isinstance(node, list | tuple):
        items = list(enumerate(node))
    else:
        flat[key] = node
        return
    for name, value in items:
        _flatten(value, f'{key}.{name}'.lstrip('.'), flat)


def read_run(work_dir: Path) -> Run | Unusable:
    """The newest test of the model of a work dir, else the validation at the end of its training.

    Unusable where nothing is there, something is broken, the training is not finished or was not evaluated.
    """
    try:
        return _read(work_dir)
    except Unusable as error:
        return error


def _read(work_dir: Path) -> Run:
    if not work_dir.is_dir():
        raise Unusable('there is no such folder')
    # TIMESTAMP folders of training and testing, testing often in a folder of its own below
    sessions = sorted(
        {path.parents[1] for path in work_dir.rglob('vis_data/config.py')}, key=lambda s: s.name
    )
    if not sessions:
        raise Unusable('no run of MMEngine is in it, there is no TIMESTAMP/vis_data/config.py')
    notes: list[str] = []
    logs = {session: _records(session / 'vis_data' / 'scalars.json', notes) for session in sessions}
    trainings = [session for session in sessions if any('loss' in record for record in logs[session])]
    homes = sorted({str(session.parent) for session in trainings})
    if len(homes) > 1:
        raise Unusable(f'several runs are in it, name them one by one: {", ".join(homes)}')
    tests = [session for session in sessions if (session / f'{session.name}.json').exists()]
    if not trainings and not tests:
        raise Unusable('the run in it ended before it had logged anything')
    if trainings:  # from the last that was not resumed from the one before
        configs = [_config(session) for session in trainings]
        start = max(n for n, cfg in enumerate(configs) if n == 0 or not cfg.get('resume'))
        trainings, config = trainings[start:], configs[-1]
        tests = [session for session in tests if session.name >= trainings[0].name]  # not of a former model
    else:
        config = _config(tests[-1])
    records = [record for session in trainings for record in logs[session]]
    limit = (config.get('train_cfg') or {}).get('max_iters') if trainings else None
    if limit is not None:
        reached = max(record.get('step', 0) for record in records)
        if reached < limit and not (trainings[-1].parent / f'iter_{limit}.pth').exists():
            raise Unusable(
                f'half-finished, {reached} of {limit} iterations; train.py --resume goes on with it'
            )
    session, metrics, source = _results(tests, trainings, logs)
    if limit is not None and (at := re.search(r'iter_(\d+)\.pth', source)) and int(at[1]) != limit:
        notes.append(f'tested after {at[1]} of {limit} iterations')
    if not any(key.startswith('IoU.') for key in metrics):
        raise Unusable(
            'its results lack the IoU of each class; test it with ImbalanceIoUMetric: '
            'test.py ... --cfg-options test_evaluator.type=ImbalanceIoUMetric'
        )
    scores = None
    if (session / 'image_scores.npz').exists():
        try:
            scores = load_image_scores(session / 'image_scores.npz')
        except ValueError as error:
            notes.append(f'no interval over images: {error}')
    train = [record for record in records if 'loss' in record]
    return Run(
        work_dir,
        max(session.parent.glob('*.py'), key=lambda path: path.stat().st_mtime, default=work_dir).stem,
        config,
        metrics,
        source,
        scores,
        _class_pixels(work_dir, scores),
        limit,
        _seconds(train),
        max((record['memory'] for record in train if 'memory' in record), default=None),
        _hardware(trainings[-1]) if trainings else None,
        notes,
    )


def _results(tests: list[Path], trainings: list[Path], logs: dict) -> tuple[Path, dict[str, float], str]:
    """The session that evaluated last, its metrics and where they are from."""
    if tests:
        path = tests[-1] / f'{tests[-1].name}.json'
        try:
            metrics = json.loads(path.read_text())
            numbers = {key: float(value) for key, value in metrics.items() if isinstance(value, int | float)}
        except (OSError, ValueError, AttributeError) as error:
            raise Unusable(f'its test result {path} is broken: {error}') from error
        checkpoint = _config(tests[-1]).get('load_from')
        return tests[-1], numbers, f'test of {Path(checkpoint).name}' if checkpoint else 'test'
    for session in reversed(trainings):
        for record in reversed(logs[session]):
            if 'mIoU' in record and 'loss' not in record:
                step = record['step']
                return session, {k: v for k, v in record.items() if k != 'step'}, f'validation at {step}'
    raise Unusable('it was neither validated nor tested; test.py CONFIG CHECKPOINT --work-dir DIR does it')


def _records(path: Path, notes: list[str]) -> list[dict]:
    records = []
    if path.exists():
        for number, line in enumerate(path.read_text(errors='replace').splitlines(), 1):
            record = _parsed(line)
            if isinstance(record, dict):
                records.append(record)
            else:  # cut off where a run was killed
                notes.append(f'line {number} of {path} is broken and left out')
    return records


def _parsed(line: str) -> object:
    try:
        return json.loads(line)
    except ValueError:
        return None


def _config(session: Path) -> Config:
    path = session / 'vis_data' / 'config.py'
    try:
        return Config.fromfile(str(path), import_custom_modules=False)
    except Exception as error:  # it is Python
        raise Unusable(f'its config {path} is broken: {type(error).__name__}: {error}') from error


def _class_pixels(work_dir: Path, scores: dict | None) -> dict[str, int]:
    if scores is not None and len(scores['pixels']):
        return dict(zip(scores['classes'].tolist(), scores['pixels'].tolist(), strict=True))
    try:  # of ClassWeightHook
        record = json.loads((work_dir / 'class_weights.json').read_text())
        return dict(zip(record['classes'], record['pixels'], strict=True))
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _seconds(train: list[dict]) -> float | None:
    total, before = 0.0, 0
    for record in train:
        step = record.get('iter', 0)
        total += record.get('time', 0) * max(step - before, 0)
        before = step
    return total or None


def _hardware(session: Path) -> str | None:
    log = session / f'{session.name}.log'
    text = log.read_text(errors='replace') if log.exists() else ''
    number = re.search(r'GPU number: (\d+)', text)
    name = re.search(r'^ *GPU 0[\d,]*: (.+)$', text, re.MULTILINE)
    if name is None:
        return 'CPU' if 'CUDA available: False' in text else None
    return f'{number[1] if number else 1}x {name[1].strip()}'
