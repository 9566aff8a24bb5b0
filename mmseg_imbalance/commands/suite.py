"""``mmseg-imbalance suite``: run a suite of experiments, several at a time, and collect their results."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from fnmatch import fnmatchcase
from pathlib import Path

from mmseg_imbalance.commands.options import command_parser, need_mmsegmentation
from mmseg_imbalance.version import __version__

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
    """A place where one run at a time trains: cores, or a GPU.

    Args:
        threads: of a run.
        gpu: as CUDA_VISIBLE_DEVICES names it; None: the CPU.
        hardware: for the rows.
    """

    def __init__(self, threads: int, gpu: str | None, hardware: str) -> None:
        self.threads = threads
        self.hardware = hardware
        self.environment = dict(OMP_NUM_THREADS=str(threads))
        if gpu is not None:
            self.environment['CUDA_VISIBLE_DEVICES'] = gpu
        self.process: subprocess.Popen | None = None
        self.run = None
        self.steps: list[list[object]] = []  # command lines that come after that of the process


def make_slots(jobs: int | None) -> list[Slot]:
    """One slot per GPU, or per core where there is none; ``jobs`` shares the GPUs or the cores."""
    import torch

    from mmseg_imbalance.hardware import cores, cpu_name

    gpus = torch.cuda.device_count()
    jobs = jobs or gpus or cores()
    threads = max(1, cores() // jobs)
    if not gpus:
        hardware = f'{cpu_name()}, {threads} core{"s" if threads > 1 else ""}'
        return [Slot(threads, None, hardware) for _ in range(jobs)]
    visible = os.environ.get('CUDA_VISIBLE_DEVICES')
    names = visible.split(',') if visible else [str(gpu) for gpu in range(gpus)]
    return [Slot(threads, names[n % gpus], torch.cuda.get_device_name(n % gpus)) for n in range(jobs)]


def at_least_1(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'{text!r} is no number of jobs, which is 1 or more')
    return int(text)


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
    options.add_argument(
        '--jobs', type=at_least_1, metavar='N', help='runs at a time; default one per GPU or core'
    )
    args = options.parse_args(argv)
    need_mmsegmentation()
    from mmseg_imbalance.files import locked

    if args.results is not None and args.results.resolve() == args.work_dir.resolve():
        options.error(f'--results and --work-dir are the same folder, {args.results}: give --results another')

    try:
        with locked(args.work_dir, wait=False) as lock:
            return Execution(args, lock).all()
    except BlockingIOError:
        options.error(f'another suite runs in {args.work_dir}; take another --work-dir, or wait')
    except (FileNotFoundError, ValueError) as error:
        options.error(str(error))


def _stop(*_: object) -> None:
    raise SystemExit(143)


class Execution:
    """The runs of a suite on this machine.

    Args:
        lock: of the work dir, which a training keeps where its suite is killed; None: there is none.
    """

    def __init__(self, args: argparse.Namespace, lock: int | None) -> None:
        from mmseg_imbalance.suite import KEY, Suite, fingerprint, read_rows

        self.args = args
        self.lock = lock
        self.suite = Suite(args.suite)
        self.results = args.results or args.work_dir / 'results'
        self.slots = make_slots(args.jobs)
        done = {
            tuple(row[column] for column in (*KEY, 'config'))
            for dataset in self.suite.datasets
            for row in read_rows(self.results / f'{dataset}.csv')
        }
        asked = self.suite.runs(args.seeds)
        if args.only:
            asked = [run for run in asked if any(fnmatchcase(run.title, only) for only in args.only)]
        if not asked:
            titles = dict.fromkeys(run.title for run in self.suite.runs())
            seeds = max(group['seeds'] for group in self.suite.groups)
            raise ValueError(
                f'no run is asked for; those of {args.suite} are {list(titles)}, seeds 0 to {seeds - 1}'
            )
        for dataset in dict.fromkeys(run.dataset for run in asked):
            if not (args.data / dataset).is_dir():
                raise FileNotFoundError(f'no folder {args.data / dataset}; --data holds one per data set')
        self.configs = {run: self.suite.config(run) for run in asked}
        self.prints = {
            run: fingerprint(cfg) + ('+bias' if self.model(run) != run else '')
            for run, cfg in self.configs.items()
        }
        self.waiting = [run for run in asked if (*run.key, self.prints[run]) not in done]
        print(f'{len(asked)} runs, {len(asked) - len(self.waiting)} of them finished before', flush=True)
        self.failed = 0
        self.started = time.monotonic()
        self.trained = 0  # iterations of runs that ended, and those of runs that did not
        self.left = sum(self.iterations(run) for run in self.waiting)

    def all(self) -> int:
        remaining = list(self.waiting)
        signal.signal(signal.SIGTERM, _stop)  # as Ctrl-C: no training is left behind
        try:
            while remaining or any(slot.process for slot in self.slots):
                for slot in self.slots:
                    if slot.process is not None and slot.process.poll() is not None:
                        if slot.process.returncode == 0 and slot.steps:
                            self.step(slot)
                        else:
                            self.end(slot)
                    if slot.process is None and (run := self.next(remaining)) is not None:
                        remaining.remove(run)
                        self.start(slot, run)
                time.sleep(1)
        finally:
            for slot in self.slots:
                if slot.process is not None:
                    slot.process.terminate()
                    slot.process.wait()
        return 1 if self.failed else 0

    def model(self, run):
        """The run whose training makes the model of a run."""
        return run.of(self.suite.trained_as(run.method))

    def iterations(self, run) -> int:
        """Those to be trained; none for a run that takes the model of another."""
        return self.suite.iterations(run) if self.model(run) == run else 0

    def next(self, remaining):
        """The first whose model is not being trained; None: there is none yet."""
        busy = {self.model(slot.run) for slot in self.slots if slot.process is not None}
        return next((run for run in remaining if self.model(run) not in busy), None)

    def folder(self, run) -> Path:
        return self.args.work_dir / run.name

    def start(self, slot: Slot, run) -> None:
        from mmseg_imbalance.shipped import PACKAGE, is_checkout, tools
        from mmseg_imbalance.suite import commit_of

        slot.run, slot.commit = run, commit_of(PACKAGE) if is_checkout() else __version__
        slot.started = time.monotonic()
        trained = self.prepare(slot)
        config, folder = trained / 'config.py', self.folder(run)
        checkpoint = trained / f'iter_{self.suite.iterations(run)}.pth'
        python, train, test = sys.executable, tools() / 'train.py', tools() / 'test.py'
        slot.steps = [[python, train, config, '--work-dir', trained, '--resume']]
        if folder != trained:
            if checkpoint.exists():
                slot.steps.clear()
            if folder.exists():  # of a test that was broken off
                folder.rename(folder.with_name(f'{folder.name}.{int(time.time())}'))
            corrected = folder / 'bias.pth'
            fit = [python, '-m', 'mmseg_imbalance', 'fit-bias', config, checkpoint, '--out', corrected]
            slot.steps += [fit, [python, test, config, corrected, '--work-dir', folder]]
        folder.mkdir(parents=True, exist_ok=True)
        self.step(slot)

    def prepare(self, slot: Slot) -> Path:
        """The folder where the model of a run trains or has trained, with its config."""
        import torch

        from mmseg_imbalance.hardware import slow_in_bfloat16
        from mmseg_imbalance.suite import on_this_machine, prepare_resume

        run = self.model(slot.run)
        folder, cfg = self.folder(run), self.configs[slot.run].copy()
        folder.mkdir(parents=True, exist_ok=True)
        kept, print_of_model = folder / 'fingerprint.txt', self.prints[slot.run].removesuffix('+bias')
        if kept.exists() and kept.read_text() != print_of_model:  # of an older suite file
            folder.rename(folder.with_name(f'{folder.name}.{int(time.time())}'))
            folder.mkdir()
        kept.write_text(print_of_model)
        prepare_resume(folder, self.suite.iterations(run))
        workers = min(4, slot.threads - 1)
        data, cuda = self.args.data / run.dataset, torch.cuda.is_available()
        on_this_machine(cfg, data, workers, float32=slow_in_bfloat16(), fused=cuda)
        cfg.dump(folder / 'config.py')
        return folder

    def step(self, slot: Slot) -> None:
        """Start the next command of a run."""
        with open(self.folder(slot.run) / 'output.txt', 'a') as output:
            slot.process = subprocess.Popen(
                [str(part) for part in slot.steps.pop(0)],
                env=os.environ | slot.environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=() if self.lock is None else (self.lock,),
            )

    def end(self, slot: Slot) -> None:
        """Add the row of a run that has ended, or say that it has failed."""
        from mmseg_imbalance.reports.work_dirs import Unusable, read_run
        from mmseg_imbalance.suite import KEY, append_row, evaluations

        run, code = slot.run, slot.process.returncode
        slot.process = None
        self.left -= self.iterations(run)
        folder = self.folder(run)
        found = read_run(folder)
        if code or isinstance(found, Unusable) or not found.complete:
            self.failed += 1
            reason = found.reason if not code and isinstance(found, Unusable) else f'status {code}'
            print(f'{run.name} failed, {reason}; {folder / "output.txt"} says more', flush=True)
            return
        times = {'iter', 'time', 'data_time'}
        metrics = {name: value for name, value in found.metrics.items() if name not in times}
        row = dict(zip(KEY, run.key, strict=True)) | dict(
            iterations=self.suite.iterations(run),
            commit=slot.commit,
            hardware=slot.hardware,
            minutes=round((found.seconds or time.monotonic() - slot.started) / 60, 2),
            config=self.prints[run],
            curve=' '.join(f'{step}:{value}' for step, value in evaluations(folder).items()),
            **metrics,
            **{f'Pixels.{name}': pixels for name, pixels in found.class_pixels.items()},
        )
        try:
            append_row(self.results / f'{run.dataset}.csv', row)
        except (OSError, ValueError) as error:  # other trainings go on; the next call adds the row
            self.failed += 1
            print(f'{run.name} has ended, but its row could not be added: {error}', flush=True)
            return
        self.trained += self.iterations(run)
        tail = f', tail {metrics["mIoU.tail"]:.2f}' if 'mIoU.tail' in metrics else ''
        if self.trained:
            minutes = self.left * (time.monotonic() - self.started) / self.trained / 60
            tail += f'; the rest takes {minutes:.0f} minutes'
        print(f'{run.name}: mIoU {metrics["mIoU"]:.2f}{tail}', flush=True)
