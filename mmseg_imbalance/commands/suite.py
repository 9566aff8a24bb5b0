"""``mmseg-imbalance suite``: run a suite of experiments, several at a time, and collect their results."""

from __future__ import annotations

import argparse
import os
import platform
import signal
import subprocess
import sys
import time
from fnmatch import fnmatchcase
from pathlib import Path

from mmseg_imbalance.commands.options import command_parser, need_mmsegmentation

DESCRIPTION = """\
Run the trainings of a suite file: data sets x schedules x methods x seeds.
Runs whose row is in the results are skipped, broken ones go on from their
last checkpoint. One row per run is added to RESULTS/DATASET.csv as it ends;
mmseg-imbalance results makes a page of them."""


def seed_list(text: str) -> list[int]:
    """The numbers of '0-4' or '0,2,3'."""
    seeds: list[int] = []
    try:
        for part in text.split(','):
            first, _, last = part.partition('-')
            seeds += range(int(first), int(last or first) + 1)
    except ValueError:
        raise argparse.ArgumentTypeError(f'{text!r} is no list of seeds such as 0-4 or 0,2') from None
    return seeds


class Slot:
    """A place where one run at a time trains: a core, or a GPU."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.environment = environment
        self.process: subprocess.Popen | None = None
        self.run = None


def make_slots(jobs: int | None) -> list[Slot]:
    """One slot per GPU, or per core where there is none; ``jobs`` shares the GPUs or the cores."""
    import torch

    gpus, cores = torch.cuda.device_count(), len(os.sched_getaffinity(0))
    jobs = jobs or gpus or cores
    threads = dict(OMP_NUM_THREADS=str(max(1, cores // jobs)))
    if not gpus:
        return [Slot(threads) for _ in range(jobs)]
    return [Slot(threads | dict(CUDA_VISIBLE_DEVICES=str(job % gpus))) for job in range(jobs)]


def cpu_info(key: str) -> str:
    """What Linux says of the first core, '' elsewhere."""
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
    except OSError:
        return ''
    return next((line.split(':', 1)[1].strip() for line in lines if line.startswith(key)), '')


def slow_in_bfloat16() -> bool:
    import torch

    return not torch.cuda.is_available() and 'amx_bf16' not in cpu_info('flags')


def hardware(threads: str) -> str:
    """What a run trains on: a GPU, or so many cores of a CPU."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    name = cpu_info('model name') or platform.processor() or platform.machine()
    return f'{name}, {threads} core{"s" if threads != "1" else ""}'


def main(argv: list[str] | None = None) -> int:
    options = command_parser(
        'suite',
        DESCRIPTION,
        'configs/experiments/suite.py --data data --work-dir work_dirs/suite --seeds 0-2',
    )
    options.add_argument('suite', metavar='SUITE', help='suite file')
    options.add_argument(
        '--data', type=Path, required=True, metavar='DIR', help='holds a folder per data set'
    )
    options.add_argument('--work-dir', type=Path, required=True, metavar='DIR', help='of the runs')
    options.add_argument('--results', type=Path, metavar='DIR', help='of the rows; default WORK_DIR/results')
    options.add_argument('--seeds', type=seed_list, metavar='LIST', help='of the suite only these, as 0-4')
    options.add_argument(
        '--only', nargs='+', metavar='PATTERN', help="only runs DATASET/SCHEDULE/METHOD, as 'camvid/short/*'"
    )
    options.add_argument('--jobs', type=int, metavar='N', help='runs at a time; default one per GPU or core')
    args = options.parse_args(argv)
    need_mmsegmentation()
    try:
        execution = Execution(args)
    except (FileNotFoundError, ValueError) as error:
        options.error(str(error))
    return execution.all()


def _stop(*_: object) -> None:
    raise SystemExit(143)


class Execution:
    """The runs of a suite on this machine."""

    def __init__(self, args: argparse.Namespace) -> None:
        from mmseg_imbalance.suite import Suite, fingerprint, read_rows

        self.args = args
        self.suite = Suite(args.suite)
        self.results = args.results or args.work_dir / 'results'
        self.slots = make_slots(args.jobs)
        done = {
            (row['suite'], row['dataset'], row['schedule'], row['method'], row['seed'], row['config'])
            for dataset in self.suite.datasets
            for row in read_rows(self.results / f'{dataset}.csv')
        }
        asked = self.suite.runs(args.seeds)
        if args.only:
            asked = [run for run in asked if any(fnmatchcase(run.title, only) for only in args.only)]
        if not asked:
            titles = dict.fromkeys(run.title for run in self.suite.runs())
            raise ValueError(f'no run is asked for; those of {args.suite} are {list(titles)}')
        for dataset in dict.fromkeys(run.dataset for run in asked):
            if not (args.data / dataset).is_dir():
                raise FileNotFoundError(f'no folder {args.data / dataset}; --data holds one per data set')
        self.configs = {run: self.suite.config(run) for run in asked}
        self.prints = {run: fingerprint(cfg) for run, cfg in self.configs.items()}
        self.waiting = [run for run in asked if (*run.key, self.prints[run]) not in done]
        print(f'{len(asked)} runs, {len(asked) - len(self.waiting)} of them finished before', flush=True)
        self.failed = 0
        self.started = time.monotonic()
        self.trained = 0  # iterations

    def all(self) -> int:
        remaining = list(self.waiting)
        signal.signal(signal.SIGTERM, _stop)  # as Ctrl-C: no training is left behind
        try:
            while remaining or any(slot.process for slot in self.slots):
                for slot in self.slots:
                    if slot.process is not None and slot.process.poll() is not None:
                        self.end(slot)
                    if slot.process is None and remaining:
                        self.start(slot, remaining.pop(0))
                time.sleep(1)
        finally:
            for slot in self.slots:
                if slot.process is not None:
                    slot.process.terminate()
                    slot.process.wait()
        return 1 if self.failed else 0

    def folder(self, run) -> Path:
        return self.args.work_dir / run.name

    def start(self, slot: Slot, run) -> None:
        from mmseg_imbalance.shipped import tools
        from mmseg_imbalance.suite import commit_of, on_this_machine

        folder = self.folder(run)
        folder.mkdir(parents=True, exist_ok=True)
        kept = folder / 'fingerprint.txt'
        if kept.exists() and kept.read_text() != self.prints[run]:  # of an older suite file
            folder = self.aside(folder)
        (folder / 'fingerprint.txt').write_text(self.prints[run])
        cfg = self.configs[run].copy()
        threads = int(slot.environment['OMP_NUM_THREADS'])
        on_this_machine(cfg, self.args.data / run.dataset, max(0, threads - 1), slow_in_bfloat16())
        cfg.dump(folder / 'config.py')
        slot.run, slot.commit = run, commit_of(Path(__file__).parent)
        with open(folder / 'output.txt', 'a') as output:
            slot.process = subprocess.Popen(
                [
                    sys.executable,
                    tools() / 'train.py',
                    folder / 'config.py',
                    '--work-dir',
                    folder,
                    '--resume',
                ],
                env=os.environ | slot.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    def aside(self, folder: Path) -> Path:
        old = folder.with_name(f'{folder.name}.{int(time.time())}')
        folder.rename(old)
        folder.mkdir()
        return folder

    def end(self, slot: Slot) -> None:
        from mmseg_imbalance.suite import append_row, class_pixels, evaluations, training_minutes

        run, code = slot.run, slot.process.returncode
        folder, iterations = self.folder(run), self.suite.iterations(run)
        slot.process = None
        curve = evaluations(folder)
        if code or iterations not in curve:
            self.failed += 1
            print(f'{run.name} failed, status {code}; {folder / "output.txt"} says why', flush=True)
            return
        metrics = {
            name: value
            for name, value in curve[iterations].items()
            if name not in ('step', 'iter', 'time', 'data_time')
        }
        row = dict(zip(('suite', 'dataset', 'schedule', 'method', 'seed'), run.key, strict=True)) | dict(
            iterations=iterations,
            commit=slot.commit,
            hardware=hardware(slot.environment['OMP_NUM_THREADS']),
            minutes=round(training_minutes(folder, iterations), 1),
            config=self.prints[run],
            curve=' '.join(f'{step}:{record["mIoU"]}' for step, record in curve.items()),
            **metrics,
            **{f'Pixels.{name}': pixels for name, pixels in class_pixels(folder).items()},
        )
        append_row(self.results / f'{run.dataset}.csv', row)
        self.trained += iterations
        self.waiting.remove(run)
        rate = self.trained / (time.monotonic() - self.started)
        left = sum(self.suite.iterations(other) for other in self.waiting) / rate / 60
        tail = f', tail {metrics["mIoU.tail"]}' if 'mIoU.tail' in metrics else ''
        print(
            f'{run.name}: mIoU {metrics["mIoU"]}{tail}; {len(self.waiting)} left, about {left:.0f} minutes',
            flush=True,
        )
