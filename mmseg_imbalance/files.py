"""Files that are whole or not there."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


@contextmanager
def locked(folder: str | os.PathLike[str], wait: bool = True) -> Iterator[int | None]:
    """Hold a folder, which is made where it is missing, for this process alone; not on Windows.

    Args:
        wait: for another process that holds it.

    Yields:
        The open file; a process that gets it holds the folder too, also when this one has ended.

    Raises:
        BlockingIOError: another process holds it, and ``wait`` is False.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield None
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def write_atomically(path: str | os.PathLike[str], mode: str = 'w') -> Iterator[IO[Any]]:
    """Open a file to write that takes the place of ``path`` when the block ends without an error.

    It is written beside ``path`` as ``PATH.<random>.tmp`` and renamed at the end. After an error ``path`` is
    as it was and the temporary file is removed. A pipe or a device, as ``/dev/stdout``, is written directly.

    Args:
        path: of the file; missing folders are made.
        mode: 'w' for text, which is UTF-8 with line ends as written; 'wb' for bytes.

    Yields:
        The open file.
    """
    if mode not in ('w', 'wb'):
        raise ValueError(f"mode={mode!r}, allowed are 'w' for text and 'wb' for bytes.")
    options: dict[str, Any] = {} if 'b' in mode else dict(encoding='utf-8', newline='')
    target = Path(path)
    if target.exists() and not target.is_file():
        with open(target, mode, **options) as file:  # a folder is the error that open raises
            yield file
        return
    target = target.resolve()  # a link stays one
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f'{target.name}.{uuid.uuid4().hex}.tmp')
    try:
        with open(temporary, mode.replace('w', 'x'), **options) as file:
            yield file
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
