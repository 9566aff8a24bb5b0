"""A suite of experiments: data sets x schedules x methods x seeds, each run a config and a row of results.

A suite file is an MMEngine config that sets four names:

    datasets = dict(NAME='CONFIG of the baseline, relative to the suite file')
    schedules = dict(NAME=iterations)
    methods = {'NAME': dict(lines that differ from the baseline)}
    runs = [dict(dataset=NAME, schedule=NAME, seeds=5, methods=[NAME, ...])]   # without methods: all

A file that others name as ``_base_`` writes ``{{ fileDirname }}/`` before the names of its configs.

Two lines of a method are not of a config. ``augment=[TRANSFORM, ...]`` puts transforms before the last one of
the training pipeline, which packs; those that mix images, as RareClassPaste does, get a MultiImageMixDataset.
``fit_bias='OTHER'`` trains nothing: it is the model of the method OTHER after ``mmseg-imbalance fit-bias``.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
import subprocess
from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path

from mmseg_imbalance.registry import TRANSFORMS

from mmengine.config import Config, ConfigDict

import mmseg_imbalance.compat  # noqa: F401  where mmseg:: bases are found
from mmseg_imbalance.config_fields import innermost
from mmseg_imbalance.files import locked, write_atomically
from mmseg_imbalance.reports.identity import settings
from mmseg_imbalance.reports.work_dirs import metric_prefix, read_records

SPLITS = ('train', 'val', 'test')
KEY = ('suite', 'dataset', 'schedule', 'method', 'seed')  # columns that name a run in the rows of results
# what a row says before its metrics
COLUMNS = (*KEY, 'iterations', 'commit', 'hardware', 'minutes', 'config', 'curve')


@dataclass(frozen=True)
class SuiteRun:
    """One training of a suite."""

    suite: str
    dataset: str
    schedule: str
    method: str
    seed: int

    @property
    def key(self) -> tuple[str, ...]:
        """Its cells of the columns KEY."""
        return tuple(str(getattr(self, column)) for column in KEY)

    @property
    def title(self) -> str:
        return f'{self.dataset}/{self.schedule}/{self.method}'

    def of(self, method: str) -> SuiteRun:
        """The run of another method."""
        return replace(self, method=method)

    @property
    def name(self) -> str:
        """The folder of the run, below the work dir."""
        return f'{self.dataset}/{self.schedule}/{self.slug}/seed{self.seed}'

    @property
    def slug(self) -> str:
        """The method in letters that any file system takes."""
        return re.sub(r'[^a-z0-9.]+', '-', self.method.lower()).strip('-')


class Suite:
    """A suite file, read and checked.

    Args:
        path: of the file.

    Raises:
        FileNotFoundError: the file, or the config of a data set, does not exist.
        ValueError: a name is missing, unknown or of the wrong kind.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f'no suite file {os.fspath(path)!r}; configs/experiments/suite.py is one')
        self.name = self.path.stem
        content = Config.fromfile(self.path)
        missing = [name for name in ('datasets', 'schedules', 'methods', 'runs') if not content.get(name)]
        if missing:
            raise ValueError(
                f'{self.path} does not set {", ".join(missing)}; a suite file sets datasets, schedules, '
                'methods and runs'
            )
        self._check_shape(content)
        self.datasets = {name: self.path.parent / config for name, config in content.datasets.items()}
        for name, config in self.datasets.items():
            if not config.is_file():
                raise FileNotFoundError(f'{self.path}: the data set {name!r} has no config {config}')
        self.schedules: dict[str, int] = dict(content.schedules)
        for name, iterations in self.schedules.items():
            if not isinstance(iterations, int) or iterations < 1:
                raise ValueError(
                    f'{self.path}: a schedule is a number of iterations, at least 1, got '
                    f'{name}={iterations!r}'
                )
        self.methods: dict[str, ConfigDict] = dict(content.methods)
        self.groups = [dict(group) for group in content.runs]
        for group in self.groups:
            self._check(group)
        folders: dict[str, str] = {}
        for run in self.runs():
            if (other := folders.setdefault(run.name, run.method)) != run.method or not run.slug:
                raise ValueError(
                    f'{self.path}: the folder of a method is named by its letters a to z and digits, which '
                    f'{run.method!r} {"lacks" if not run.slug else f"shares with {other!r}"}; rename it'
                )

    def _check_shape(self, content: Config) -> None:
        shapes = {
            'datasets': (dict, (str, os.PathLike), 'a dict of the paths of configs by name'),
            'schedules': (dict, object, 'a dict of numbers of iterations by name'),
            'methods': (dict, dict, 'a dict of the changed lines, dicts, by name'),
            'runs': ((list, tuple), dict, 'a list of dicts'),
        }
        for name, (outer, inner, wanted) in shapes.items():
            given = content[name]
            if isinstance(given, outer):
                items = given.values() if outer is dict else given
                wrong = [item for item in items if not isinstance(item, inner)]
                if outer is dict:
                    wrong += [key for key in given if not isinstance(key, str)]
                if not wrong:
                    continue
                given = wrong[0]
            raise ValueError(f'{self.path}: {name} is {wanted}, got {given!r}')

    def _check(self, group: dict) -> None:
        unknown = set(group) - {'dataset', 'schedule', 'seeds', 'methods'}
        if unknown or not {'dataset', 'schedule', 'seeds'} <= set(group):
            raise ValueError(
                f'{self.path}: an entry of runs has dataset, schedule, seeds and perhaps methods, got {group}'
            )
        methods = group.get('methods') or []
        if not isinstance(methods, list | tuple) or not all(isinstance(method, str) for method in methods):
            raise ValueError(f'{self.path}: methods of an entry of runs is a list of names, got {methods!r}')
        if not isinstance(group['seeds'], int) or group['seeds'] < 1:
            raise ValueError(
                f'{self.path}: seeds is their number, 3 for the seeds 0, 1 and 2, got {group["seeds"]!r}'
            )
        for what, known in (('dataset', self.datasets), ('schedule', self.schedules)):
            if not isinstance(group[what], str) or group[what] not in known:
                raise ValueError(f'{self.path}: {what} {group[what]!r} is none of {list(known)}')
        for method in methods:
            if method not in self.methods:
                raise ValueError(f'{self.path}: method {method!r} is none of {list(self.methods)}')
        names = list(methods or self.methods)
        for at, method in enumerate(names):
            trained = self.trained_as(method)
            if trained != method and (trained not in names[:at] or self.trained_as(trained) != trained):
                raise ValueError(
                    f'{self.path}: {method!r} changes the model of {trained!r}, which has to train one and '
                    f'to stand before it among the methods, {names}'
                )

    def runs(self, seeds: Iterable[int] | None = None) -> list[SuiteRun]:
        """All runs, seed by seed, so that a suite that is stopped early holds whole comparisons.

        Args:
            seeds: of the suite's seeds only these; None: all.
        """
        runs = []
        for group in self.groups:
            for seed in range(group['seeds']):
                if seeds is not None and seed not in seeds:
                    continue
                for method in group.get('methods') or self.methods:
                    run = SuiteRun(self.name, group['dataset'], group['schedule'], method, seed)
                    if run not in runs:  # a group may name again what another has
                        runs.append(run)
        return runs

    def trained_as(self, method: str) -> str:
        """The method whose training makes the model of this one: mostly itself."""
        return self.methods[method].get('fit_bias', method)

    def iterations(self, run: SuiteRun) -> int:
        return self.schedules[run.schedule]

    def config(self, run: SuiteRun) -> Config:
        """The config of a run, with the data where the config of the data set says.

        A test, as of a model with a fitted bias, is of the validation images, as every row of results is.
        """
        cfg = Config.fromfile(self.datasets[run.dataset])
        for split in ('train', 'val'):
            if not cfg.get(f'{split}_dataloader'):
                raise ValueError(f'{self.datasets[run.dataset]} has no {split}_dataloader: a suite needs one')
        iterations = self.iterations(run)
        warmup = max(1, min(100, iterations // 5))
        cfg.merge_from_dict(
            {
                'train_cfg.max_iters': iterations,
                'train_cfg.val_interval': min(iterations, 500),
                'param_scheduler': [
                    dict(type='LinearLR', start_factor=1e-3, by_epoch=False, begin=0, end=warmup),
                    dict(type='PolyLR', eta_min=0.0, power=1.0, by_epoch=False, begin=warmup, end=iterations),
                ],
                'default_hooks.checkpoint': dict(interval=100, max_keep_ckpts=2),
                'default_hooks.logger.interval': min(iterations, 50),
                'default_hooks.logger.log_metric_by_epoch': False,  # else the curve has no iterations
                'randomness': dict(seed=run.seed),
                # searching cuDNN's kernels takes seconds for each size, and tested images have many
                'env_cfg.cudnn_benchmark': False,
            }
        )
        lines = self.methods[self.trained_as(run.method)].to_dict()
        augment = lines.pop('augment', ())
        _replace_other_types(lines, cfg)
        cfg.merge_from_dict(lines)
        if augment:
            add_transforms(cfg.train_dataloader, augment)
        for part in ('dataloader', 'evaluator'):
            cfg[f'test_{part}'] = deepcopy(cfg[f'val_{part}'])
        cfg.test_cfg = dict(type='TestLoop')
        inner = [each for split in SPLITS for each in innermost(cfg[f'{split}_dataloader'].dataset)]
        if len(roots := {str(dataset.get('data_root')).rstrip('/') for dataset in inner}) > 1:
            raise ValueError(
                f'{self.datasets[run.dataset]} has data below {sorted(roots)}, but a suite takes all of a '
                'data set from one folder, --data/NAME. Set one data_root, with the folders in data_prefix'
            )
        return cfg


def _replace_other_types(lines: dict, cfg: ConfigDict) -> None:
    """Let a loss or a sampler replace one of another type, as with ``_delete_``, in place.

    Where a suite changes a method of its ``_base_``, MMEngine takes ``_delete_`` out as it merges the two
    files: the options of the baseline's loss would get into the method's.
    """
    for key, new in lines.items():
        old = cfg.get(key)
        if isinstance(new, dict) and isinstance(old, dict):
            if key in ('loss_decode', 'sampler') and new.get('type', old.get('type')) != old.get('type'):
                new['_delete_'] = True
            else:
                _replace_other_types(new, old)


def add_transforms(loader: ConfigDict, transforms: list[dict]) -> None:
    """Put transforms before the last one of a loader's data set.

    Raises:
        ValueError: it has no pipeline of its own.
    """
    dataset = loader.dataset
    if 'pipeline' not in dataset:
        raise ValueError(
            f'augment of a method finds no pipeline in train_dataloader.dataset, which is a {dataset.type}; '
            'take the data set inside it: a training by iterations needs no RepeatDataset'
        )
    *before, pack = dataset.pipeline
    mixing = any(hasattr(TRANSFORMS.get(transform['type']), 'get_indices') for transform in transforms)
    if mixing and 'dataset' not in dataset:  # else it is one that mixes images
        dataset.pipeline = before
        outer = [*transforms, pack]
        loader.dataset = dict(type='MultiImageMixDataset', dataset=dataset, pipeline=outer)
    else:
        dataset.pipeline = [*before, *transforms, pack]


def fingerprint(cfg: Config) -> str:
    """What trains and what is tested, in 12 letters: all seeds of a method have the same."""
    text = json.dumps(settings(cfg, 'val'), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def on_this_machine(cfg: Config, data: Path, workers: int, float32: bool, fused: bool) -> None:
    """Set what does not change a run: where the data lie, how many processes load them, what is faster.

    Args:
        float32: train in float32 where the config says bfloat16, which takes several times as long on a CPU
            without instructions for it.
        fused: one kernel per parameter for an AdamW step, in place of a dozen: on a GPU these are most of the
            time of a small network.
    """
    if fused and cfg.optim_wrapper.optimizer.type == 'AdamW':
        cfg.optim_wrapper.optimizer.fused = True
    if float32 and cfg.optim_wrapper.get('dtype') == 'bfloat16':
        cfg.optim_wrapper.type = 'OptimWrapper'
        for name in ('dtype', 'loss_scale'):
            cfg.optim_wrapper.pop(name, None)
    for split in SPLITS:
        loader = cfg[f'{split}_dataloader']
        for dataset in innermost(loader.dataset):
            dataset.data_root = str(data)
        loader.num_workers = workers
        loader.persistent_workers = workers > 0


def commit_of(folder: Path) -> str:
    """The commit of a checkout, with a '+' where files differ from it; '' outside one."""

    def git(*arguments: str) -> str:
        command = ['git', '-C', str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git('rev-parse', '--short=7', 'HEAD') + ('+' if git('status', '--porcelain', '-uno') else '')
    except (OSError, subprocess.CalledProcessError):
        return ''


def evaluations(work_dir: Path) -> dict[int, float]:
    """The mIoU of each evaluation of a training by its iteration, also of one that was resumed."""
    found = {
        record['step']: record[f'{prefix}mIoU']
        for path in sorted(work_dir.glob('*/vis_data/scalars.json'))
        for record in read_records(path, [])
        if (prefix := metric_prefix(record)) is not None
    }
    return dict(sorted(found.items()))


def prepare_resume(work_dir: Path, iterations: int) -> None:
    """Let a training that was ended in its last evaluation do it, where MMEngine would resume behind it.

    The file that names the last checkpoint may be of a folder that was moved, or of a checkpoint that was
    removed: then it gets the path of the newest one that is there, or goes.
    """
    last, name = work_dir / f'iter_{iterations}.pth', work_dir / 'last_checkpoint'
    if last.exists() and iterations not in evaluations(work_dir):
        last.unlink()
    if name.exists():
        named = work_dir / Path(name.read_text()).name
        kept = [named] if named.is_file() else work_dir.glob('iter_*.pth')
        newest = max(kept, key=lambda path: path.stat().st_mtime, default=None)
        name.unlink() if newest is None else name.write_text(str(newest))


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a file of results; none where there is no file.

    Raises:
        ValueError: it has no rows of a suite, or not any more since it was edited.
    """
    if not path.exists():
        return []
    rows = []
    with open(path, newline='', encoding='utf-8-sig') as file:  # spreadsheets write the mark of UTF-8
        reader = csv.DictReader(file)
        try:
            for row in filter(lambda row: any(row.values()), reader):
                if None in row or None in row.values():
                    raise ValueError(f'it has {"more" if None in row else "fewer"} cells than the first line')
                if missing := [name for name in COLUMNS if name not in row]:
                    raise ValueError(f'there are no columns {missing}')
                int(row['seed']), int(row['iterations'])
                rows.append(row)
        except (ValueError, csv.Error) as error:
            raise ValueError(
                f'{path}, line {reader.line_num}: no row of mmseg-imbalance suite: {error}. Mend or delete it'
            ) from error
    return rows


def append_row(path: Path, row: dict[str, object]) -> None:
    """Add a row to a file of results, and the columns that no earlier row has."""
    with locked(path.parent):
        rows = read_rows(path)
        columns = list(dict.fromkeys([*(rows[0] if rows else ()), *row]))
        with write_atomically(path) as file:
            writer = csv.DictWriter(file, columns, lineterminator='\n')
            writer.writeheader()
            writer.writerows([*rows, row])
