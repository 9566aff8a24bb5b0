"""What the ranks of a job do together while they count."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar('T')


def alone() -> bool:
    """Whether this is a worker of a data loader, which takes no part in what the ranks do together."""
    from torch.utils.data import get_worker_info

    return get_worker_info() is not None


def place() -> tuple[int, int]:
    """The rank among those that count together, and their number."""
    from mmengine.dist import get_dist_info

    return (0, 1) if alone() else get_dist_info()


def speaks() -> bool:
    """Whether this process logs what all find: the main rank, or the first worker of its data loader."""
    from mmengine.dist import is_main_process
    from torch.utils.data import get_worker_info

    worker = get_worker_info()
    return is_main_process() and (worker is None or worker.id == 0)


def attempt(work: Callable[[], T]) -> tuple[T | None, Exception | None]:
    """What `work` returns, or its exception as one that can be sent to other ranks."""
    try:
        return work(), None
    except Exception as error:
        failure: Exception = RuntimeError(f'counting failed: {type(error).__name__}: {error}')
        for kind in (FileNotFoundError, TypeError, ValueError):
            if isinstance(error, kind):
                failure = kind(str(error))  # a subclass may not survive pickling
        failure.__cause__ = error
        return None, failure


def exchange(failure: Exception | None, value: Any) -> list[Any]:
    """The `value` of every rank, of a worker its own; if one has failed, every rank raises the same."""
    from mmengine.dist import all_gather_object

    outcomes = [(failure, value)] if alone() else all_gather_object((failure, value))
    for failed, _ in outcomes:
        if failed is not None:
            raise failed
    return [value for _, value in outcomes]


def warn(message: str) -> None:
    from mmengine.logging import print_log

    print_log(message, logger='current', level=logging.WARNING)
