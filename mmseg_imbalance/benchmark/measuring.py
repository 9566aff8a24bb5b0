"""Error, memory and time of the rows of a case."""

import ctypes
import gc
import re
import sys
import time
from pathlib import Path

import torch

from mmseg_imbalance.hardware import cpu_name

CALLS = 5  # of a round on CUDA, queued back to back as they are in training
LAUNCHING = 0.02  # seconds; the queue of a device holds about a thousand launches


def check(row, tolerance):
    """Largest difference from the formula, relative to the value and to the largest gradient."""
    try:
        row.trial = row.make_trial()
        truth = row.truth or row.trial.truth
        pairs = zip(truth(), row.trial.result(), strict=True)
        row.off_by = max(((b - a).abs().max() / a.abs().max()).nan_to_num(torch.inf).item() for a, b in pairs)
    except Exception as error:
        # a backend of this package may say that it cannot run here, but not crash
        if row.ours and not isinstance(error, RuntimeError):
            raise
        # the first line of a compiler's error does not say which
        row.skipped = ' '.join(f'{type(error).__name__}: {error}'.split('\n')[:2])
    else:
        row.right = row.off_by <= tolerance


def seconds(run, device):
    """How long a run takes, and on CUDA how long the host takes to queue it, else None.

    On CUDA the first is what the device works, where its queue holds all calls; of longer runs, as training
    steps, the time from one to the next.
    """
    if device == 'cpu':
        start = time.perf_counter()
        run()
        return time.perf_counter() - start, None
    torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(CALLS):
        run()
    host = time.perf_counter() - begin
    torch.cuda.synchronize()
    if host < LAUNCHING:  # the device begins late: it has all calls in its queue and never waits for the host
        torch.cuda._sleep(int(4e9 * host))  # cycles, of which a device has about 2e9 a second
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(CALLS):
        run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / CALLS, host / CALLS


def extra_memory(run, device):
    """Bytes, None where nobody counts them."""
    gc.collect(1)  # of what the last run made; a full collection takes longer than a small loss
    if device == 'cuda':
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    # PyTorch's profiler does not see the threads of a Python pool; the peak of resident memory does
    if sys.platform != 'linux':
        return None
    ctypes.CDLL(None).malloc_trim(0)
    before = _memory('VmRSS')
    Path('/proc/self/clear_refs').write_text('5')  # resets VmHWM
    run()
    return _memory('VmHWM') - before


def _memory(key):
    return 1024 * int(re.search(rf'{key}:\s+(\d+) kB', Path('/proc/self/status').read_text())[1])


def keep_freed_blocks(keep):
    """Let the C allocator hold what is freed, as it comes to do by itself, or give back even small blocks."""
    if sys.platform == 'linux':
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 32 << 20 if keep else 1 << 16)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 64 << 20 if keep else 1 << 16)  # M_TRIM_THRESHOLD


def examine(case, args):
    """Fill in what is right and what memory it takes; the trials are let go."""
    # a few roundings of the gradient's own dtype, or of sums over many pixels
    tolerance = max(1e-4, 4 * torch.finfo(getattr(torch, args.dtype)).eps)
    for row in case.rows:
        check(row, tolerance)
        row.truth = None  # the last one frees what they share
    for _ in range(3 if case.memory else 0):  # threads overlap differently from one call to the next
        for row in case.rows:
            if not row.skipped:
                peak = extra_memory(row.trial.run, args.device)
                row.peak = peak and max(peak, row.peak or 0)
    for row in case.rows:
        row.make_trial = row.trial = None
    return case


def race(case, examined, args):
    """Fill the times of ``case``, made anew, into the rows of the examined one."""
    rows = [
        (row, new.make_trial()) for row, new in zip(examined.rows, case.rows, strict=True) if not row.skipped
    ]
    for i in range(1 + args.rounds):
        for row, trial in rows:
            elapsed, host = seconds(trial.run, args.device)
            if i:  # the first warms up
                row.seconds.append(elapsed)
                row.host_seconds.append(host)


def copy_bandwidth(device):
    """Bytes per second of a large copy on the device, read and written."""
    source = torch.ones(1 << 28, dtype=torch.uint8, device=device)
    copy = torch.ones_like(source)
    return 2 * source.nbytes / min(seconds(lambda: copy.copy_(source), device)[0] for _ in range(5))


def machine(device, bandwidth):
    """What the numbers were taken on."""
    name = cpu_name() if device == 'cpu' else torch.cuda.get_device_name()
    threads = f', {torch.get_num_threads()} threads' if device == 'cpu' else ''
    copies = f', copies {bandwidth / 1e9:.0f} GB/s' if bandwidth else ''
    return f'torch {torch.__version__}, {name}{threads}{copies}'
