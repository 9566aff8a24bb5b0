"""What the ranks of a job do together while they count."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, TypeVar

__all__ = ['attempt', 'exchange', 'warn']

T = TypeVar('T')


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
    """The `value` of every rank; if one has failed, every rank raises the same."""
    from mmengine.dist import all_gather_object

    outcomes = all_gather_object((failure, value))
    for failed, _ in outcomes:
        if failed is not None:
            raise failed
    return [value for _, value in outcomes]


def warn(message: str) -> None:
    from mmengine.logging import print_log

    print_log(message, logger='current', level=logging.WARNING)
