"""What training and testing left in a work dir, read back."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path

import numpy as np
from mmengine.config import Config

from mmseg_imbalance.config_fields import type_name
from mmseg_imbalance.reports.identity import (
    deciding_hooks,
    evaluated_at,
    has_hook,
    model_names,
    settings,
    shown_data,
    tested_data,
    training_data,
    unwrapped,
)
from mmseg_imbalance.scores import image_scores_name, load_image_scores

# what EarlyStoppingHook logs when it ends a training
STOPPED = re.compile(
    'the monitored metric did not improve|Stopping threshold reached|Monitored metric .* is infinite'
)


class Unusable(Exception):
    """A work dir cannot take part in a comparison."""

    @property
    def reason(self) -> str:
        return ' '.join(str(self).split())


@dataclass
class Run:
    """One trained and evaluated model."""

    work_dir: Path
    name: str  # of the config
    config: Config  # of the training, where that is known, else of the test
    settings: dict[str, object]  # what was trained and tested and how, equal for the seeds of one config
    models: frozenset[str]  # names of the model that was evaluated
    data: str  # what it was evaluated on, in words
    checkpoint: str  # what was evaluated, a path
    metrics: dict[str, float]
    source: str  # of the metrics
    scores: dict | None = None  # rows of every image, see mmseg_imbalance.scores.load_image_scores
    class_pixels: dict[str, int] = field(default_factory=dict)  # of the training data, where known
    length: int | None = None  # of the training, in iterations or epochs
    seconds: float | None = None  # in training iterations, validation not included
    memory: float | None = None  # MB at the peak, as logged on GPUs
    processes: int = 1
    hardware: str | None = None
    complete: bool = True  # whether the end of the training was evaluated
    notes: list[str] = field(default_factory=list)
    session: Path | None = None  # folder of the log of the evaluation

    @property
    def seed(self) -> int | None:
        return (self.config.get('randomness') or {}).get('seed')

    @property
    def classes(self) -> list[str]:
        return list(self.class_pixels or self.iou)

    @cached_property
    def iou(self) -> dict[str, float]:
        """IoU of each class in per cent; of one that no label of the images holds NaN.

        Without the pixels of the images it is as the metric has it: 0 for such a class where it is predicted.
        """
        if self.scores is None:
            return {k.removeprefix('IoU.'): v for k, v in self.metrics.items() if k.startswith('IoU.')}
        union, intersect, label = (self.scores[key].sum(0) for key in ('union', 'intersect', 'label'))
        iou = np.where(label > 0, 100 * intersect / np.maximum(union, 1), np.nan)
        return dict(zip(self.scores['classes'].tolist(), iou.tolist(), strict=True))


def read_run(work_dir: Path) -> Run | Unusable:
    """The newest test of the model of a work dir, else the last validation of its training.

    Unusable where nothing is there, something is broken, the training is not finished or was not evaluated.
    """
    try:
        return _read(work_dir)
    except Unusable as error:
        return error
    except Exception as error:  # one odd run must not stop the comparison of the others
        return Unusable(f'it cannot be read, {type(error).__name__}: {error}')


def _read(work_dir: Path) -> Run:
    notes: list[str] = []
    logs, trainings, tests = _sessions(work_dir, notes)
    config_of = cache(_config)
    config = config_of((trainings or tests)[-1]).copy()
    config.load_from = None  # that of a test is its checkpoint
    if trainings:  # from the last that was not resumed from the one before
        start = max(n for n, each in enumerate(trainings) if n == 0 or not config_of(each).get('resume'))
        trainings = trainings[start:]
        former = [session for session in tests if session.name < trainings[0].name]
        tests = [session for session in tests if session not in former]
        notes += [f'the test {session.name} is older than the training and is left out' for session in former]
        config.load_from = config_of(trainings[0]).get('load_from')
    interval = _logger(config).get('interval', 10)
    length, unit = _length(config)
    end = length  # of the training
    if trainings and length is not None:
        records = [record for session in trainings for record in logs[session]]
        _number_evaluations([logs[session] for session in trainings], config, length, unit)
        end = _reached(trainings, records, length, unit)
        if end < length and has_hook(config, 'EarlyStoppingHook') and STOPPED.search(_log(trainings[-1])):
            notes.append(f'ended by EarlyStoppingHook after {end} of {length} {unit}s')
        elif end < length:
            raise Unusable(
                f'half-finished, {end} of {length} {unit}s; '
                'mmseg-imbalance train CONFIG --resume goes on with it'
            )
    session, record, split = _results(tests, trainings, logs, notes)
    tested = config_of(session)
    if split == 'test':
        checkpoint = str(tested.get('load_from') or session)
    else:
        checkpoint = str(session.parent / f'{unit or "iter"}_{record.get("step")}.pth')
    what, note = evaluated_at(checkpoint, end, unit)
    notes += [note] if note else []
    metrics, scores = _metrics(record, session, notes)
    home = (trainings or [session])[-1]
    text = _log(home)
    processes = int(number[1]) if (number := re.search(r'GPU number: (\d+)', text)) else 1
    train = [record for each in trainings for record in logs[each] if 'loss' in record]
    class_pixels = _class_pixels(home.parent, scores)
    of_run = {
        'processes': processes if trainings else None,
        'training data': training_data(config, class_pixels),
        'tested data': tested_data(tested, split, scores),
        'checkpoint': what,
    }
    return Run(
        work_dir=work_dir,
        name=max(home.parent.glob('*.py'), key=lambda path: path.stat().st_mtime, default=work_dir).stem,
        config=config,
        settings=settings(config, split, tested) | of_run,
        models=model_names(trainings[0] if trainings else None, session, checkpoint),
        data=shown_data(tested, split, scores),
        checkpoint=checkpoint,
        metrics=metrics,
        source=_source(checkpoint, split, tested),
        scores=scores,
        class_pixels=class_pixels,
        length=end if trainings else None,
        seconds=sum(_seconds(logs[each], n > 0, interval) for n, each in enumerate(trainings)) or None,
        memory=max((record['memory'] for record in train if 'memory' in record), default=None),
        processes=processes,
        hardware=_hardware(text) if trainings else None,
        complete=what in ('end', 'end, bias'),
        notes=notes,
        session=session,
    )


def _sessions(work_dir: Path, notes: list[str]) -> tuple[dict[Path, list[dict]], list[Path], list[Path]]:
    """What each TIMESTAMP folder has logged; those of trainings, and those of tests, the oldest first."""
    if not work_dir.is_dir():
        raise Unusable('it is a file' if work_dir.exists() else 'there is no such folder')
    # testing often has a folder of its own below that of the training
    logged = {path.parents[1] for path in work_dir.rglob('vis_data/config.py')}
    results = {path.parent for path in work_dir.rglob('*.json') if path.stem == path.parent.name}
    sessions = sorted(logged | results, key=lambda session: session.name)
    if not sessions:
        raise Unusable('no run of MMEngine is in it, neither TIMESTAMP/vis_data nor TIMESTAMP/TIMESTAMP.json')
    logs = {session: read_records(session / 'vis_data' / 'scalars.json', notes) for session in sessions}
    trainings = [session for session in sessions if any('loss' in record for record in logs[session])]
    tests = [session for session in sessions if session in results]
    homes = sorted({str(session.parent) for session in trainings or tests})
    if len(homes) > 1:
        raise Unusable(f'several runs are in it, name them one by one: {", ".join(homes)}')
    if not homes:
        raise Unusable('the run in it ended before it had logged anything')
    return logs, trainings, tests


def _length(config: Config) -> tuple[int | None, str]:
    """How long a training is, and whether in iterations or in epochs."""
    loop = config.get('train_cfg') or {}
    for key, unit in (('max_iters', 'iter'), ('max_epochs', 'epoch')):
        if loop.get(key):
            return int(loop[key]), unit
    return None, ''


def _logger(config: Config) -> dict:
    return (config.get('default_hooks') or {}).get('logger') or {}


def _number_evaluations(sessions: list[list[dict]], config: Config, length: int, unit: str) -> None:
    """Let ``step`` of evaluations be of the unit of the training, whatever ``log_metric_by_epoch`` says.

    With it, a training by iterations has 0 there; without, one by epochs has iterations.
    """
    if _logger(config).get('log_metric_by_epoch', True) == (unit == 'epoch'):
        return
    loop, latest, first = config.train_cfg, {}, 0
    every = loop.get('val_interval', 1000 if unit == 'iter' else 1)
    begin = min(length, -(-loop.get('val_begin', 1) // every) * every)  # of the first evaluation
    for number, records in enumerate(sessions):
        # of the last evaluation in this session; where one that was resumed begins is not known
        before = begin - every if number == 0 else 0
        for record in records:
            if 'loss' in record:
                latest = record
            elif metric_prefix(record) is None:
                continue
            elif unit == 'epoch':
                first = first or record['step']
                record['step'] = latest.get('epoch', round(begin * record['step'] / first))
            elif record['step'] == 0:
                reached = -(-latest.get('step', 0) // every) * every
                following = 0 if loop.get('dynamic_intervals') else before + every
                record['step'] = before = min(length, max(reached, following))


def _reached(trainings: list[Path], records: list[dict], length: int, unit: str) -> int:
    """How far a training came; its end may lie after the last line of the log."""
    last = trainings[-1].parent / f'{unit}_{length}.pth'
    begun = (trainings[-1] / 'vis_data' / 'config.py').stat().st_mtime
    if last.exists() and last.stat().st_mtime >= begun:  # else of a former training
        return length
    evaluated = [record['step'] for record in records if metric_prefix(record) is not None]
    if unit == 'epoch':  # that of a line may not be over
        return max([*evaluated, *(record.get('epoch', 1) - 1 for record in records if 'loss' in record)])
    return max([*evaluated, *(record.get('step', 0) for record in records if 'loss' in record)])


def _results(
    tests: list[Path], trainings: list[Path], logs: dict[Path, list[dict]], notes: list[str]
) -> tuple[Path, dict, str]:
    """The session that evaluated last, what it logged, and the split."""
    if tests:
        path = tests[-1] / f'{tests[-1].name}.json'
        try:
            return tests[-1], dict(json.loads(path.read_text())), 'test'
        except (OSError, ValueError, TypeError) as error:
            raise Unusable(f'its test result {path} is broken: {error}') from error
    for session in reversed(trainings):
        for record in reversed(logs[session]):
            if metric_prefix(record) is not None:
                return session, record, 'val'
    raise Unusable(
        'it was neither validated nor tested with mIoU among the iou_metrics; mmseg-imbalance test CONFIG '
        f'CHECKPOINT --work-dir DIR does it{"".join(f". Note: {note}" for note in notes)}'
    )


def _metrics(record: dict, session: Path, notes: list[str]) -> tuple[dict[str, float], dict | None]:
    """The numbers of an evaluation, and the rows of its images, where they are kept."""
    prefix = metric_prefix(record) or ''
    numbers = {
        key: float(value) for key, value in record.items() if isinstance(value, int | float) and key != 'step'
    }
    # those of the evaluator with the prefix replace others of the same name
    metrics = numbers | {key.removeprefix(prefix): v for key, v in numbers.items() if key.startswith(prefix)}
    if not any(key.startswith('IoU.') for key in metrics):
        raise Unusable(
            'its results lack the IoU of each class; test it with ImbalanceIoUMetric: '
            'mmseg-imbalance test CONFIG CHECKPOINT --cfg-options test_evaluator.type=ImbalanceIoUMetric'
        )
    file = session / image_scores_name(prefix.removesuffix('/'))
    try:
        return metrics, load_image_scores(file)
    except FileNotFoundError:
        pass
    except ValueError as error:
        notes.append(f'no interval over images: {error}')
    return metrics, None


def metric_prefix(record: dict) -> str | None:
    """What an evaluator was told to put before its keys; None: it is no evaluation, but a line of training.

    Of several evaluators that of one with the IoU of each class.
    """
    if 'loss' in record:
        return None
    found = [key.removesuffix('mIoU') for key in record if re.fullmatch('(.*/)?mIoU', key)]
    with_classes = (prefix for prefix in found if any(key.startswith(f'{prefix}IoU.') for key in record))
    return next(with_classes, found[0] if found else None)


def _source(checkpoint: str, split: str, tested: Config) -> str:
    """What was evaluated, and by what it is more than the model's own prediction."""
    model, wrappers = unwrapped(tested)
    more = [type_name(wrapper) for wrapper in wrappers]
    if (model.get('test_cfg') or {}).get('mode') == 'slide':
        more.append('sliding window')
    for hook in deciding_hooks(tested):
        if 'LogitAdjustment' in type_name(hook):
            more.append(f'logit adjustment {hook.get("tau", 1.0)}')
        if hook.get('rule', 'argmax') != 'argmax':
            more.append(hook['rule'])
        if hook.get('remove_small', 1) > 1:
            more.append(f'small regions {hook["remove_small"]}')
    what = 'test of' if split == 'test' else 'validation of'
    return ', '.join([f'{what} {Path(checkpoint).name}', *more])


def read_records(path: Path, notes: list[str]) -> list[dict]:
    """The lines of a scalars.json; of one that is broken there is a note instead."""
    records = []
    if path.exists():
        for number, line in enumerate(path.read_text(errors='replace').splitlines(), 1):
            try:
                record = json.loads(line)
            except ValueError:
                record = None
            if isinstance(record, dict):
                records.append(record)
            else:  # cut off where a run was killed
                notes.append(f'line {number} of {path} is broken and left out')
    return records


def _config(session: Path) -> Config:
    path = session / 'vis_data' / 'config.py'
    if not path.exists():  # --show-dir puts the visualizer's files elsewhere; the runner leaves a copy
        path = max(session.parent.glob('*.py'), key=lambda copy: copy.stat().st_mtime, default=path)
    try:
        return Config.fromfile(str(path), import_custom_modules=False)
    except Exception as error:  # it is Python
        raise Unusable(f'its config {path} is broken: {type(error).__name__}: {error}') from error


def _class_pixels(home: Path, scores: dict | None) -> dict[str, int]:
    if scores is not None and len(scores['pixels']):
        return dict(zip(scores['classes'].tolist(), scores['pixels'].tolist(), strict=True))
    try:  # of ClassWeightHook
        record = json.loads((home / 'class_weights.json').read_text(encoding='utf-8'))
        return dict(zip(record['classes'], record['pixels'], strict=True))
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _seconds(records: list[dict], resumed: bool, interval: int) -> float:
    """Of the iterations of one session: the log has the mean time of the latest ones, every so many."""
    lines = [record for record in records if 'loss' in record and 'iter' in record]
    steps = [line['iter'] for line in lines]
    if len(steps) > 1:
        interval = steps[1] - steps[0]
    before = max(0, steps[0] - interval) if resumed and steps else 0
    return sum(line.get('time', 0) * n for line, n in zip(lines, np.diff(steps, prepend=before), strict=True))


def _log(session: Path) -> str:
    path = session / f'{session.name}.log'
    return path.read_text(errors='replace') if path.exists() else ''


def _hardware(log: str) -> str | None:
    name = re.search(r'^ *GPU 0[\d,]*: (.+)$', log, re.MULTILINE)
    if name is not None:
        return name[1].strip()
    return 'CPU' if 'CUDA available: False' in log else None
