"""Threads that each take a part of an image, where torch would split every operation among them."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from threading import Barrier
from typing import TypeVar

import torch

Part = TypeVar('Part')
Result = TypeVar('Result')


def each(function: Callable[[Part], Result], parts: Sequence[Part], on_cpu: bool) -> Iterator[Result]:
    """``function`` of each part, without gradients, in their order; on CPU by as many threads as torch uses.

    Where the system refuses a thread, this one does it all, after one warning.
    """

    @torch.no_grad()
    def quietly(part: Part) -> Result:
        return function(part)

    threads = torch.get_num_threads()
    pool = _pool(os.getpid(), threads) if on_cpu and threads > 1 and len(parts) > 1 else None
    return map(quietly, parts) if pool is None else pool.map(quietly, parts)


def _take_one_core() -> None:
    torch.get_num_threads()  # the first use sets a thread's number to the process's: before, not after
    torch.set_num_threads(1)


@lru_cache(maxsize=1)
def _pool(process: int, threads: int) -> ThreadPoolExecutor | None:
    """Threads whose operations run on one core each; of this process, as a fork keeps no threads.

    None where not all of them can be started.
    """
    pool = ThreadPoolExecutor(threads, 'soft_stats', _take_one_core)
    started = Barrier(threads)
    try:
        list(pool.map(lambda _: started.wait(), range(threads)))
    except RuntimeError as error:
        started.abort()  # those that have started would wait for the others for ever, also when Python ends
        pool.shutdown(cancel_futures=True)
        warnings.warn(
            f'soft_stats cannot start {threads} threads ({error}) and goes on with one, which is slower. '
            'Raise the limit on threads (ulimit -u, or the pids limit of the container), or set '
            'OMP_NUM_THREADS=1',
            stacklevel=2,
        )
        return None
    finally:
        torch.set_num_threads(threads)  # what a thread sets for itself is also the default of later ones
    return pool
