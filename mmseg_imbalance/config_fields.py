"""What a config says and what is built from it has, read in the same way."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any


def get_field(node: Any, name: str, default: Any = None) -> Any:
    """The entry of a config, or the attribute of an object."""
    return node.get(name, default) if isinstance(node, dict) else getattr(node, name, default)


def type_name(node: Any) -> str:
    """The class of an object, or the type that a config names, without a scope; empty if it names none.

    In Python configs the type may be the class itself.
    """
    kind = node.get('type', '') if isinstance(node, dict) else type(node)
    return getattr(kind, '__name__', str(kind)).rpartition('.')[2]


def innermost(dataset: Any) -> Iterator[Any]:
    """The data sets inside ConcatDataset, RepeatDataset and others, or their configs."""
    if (several := get_field(dataset, 'datasets')) is not None:
        for each in several:
            yield from innermost(each)
    elif (inner := get_field(dataset, 'dataset')) is not None:
        yield from innermost(inner)
    elif dataset is not None:
        yield dataset


def transforms_of(dataset: Any) -> Iterator[Any]:
    """Those of a data set and of the data sets inside, also inside of others."""
    if dataset is None:
        return
    for inner in [*(getattr(dataset, 'datasets', None) or ()), getattr(dataset, 'dataset', None)]:
        yield from transforms_of(inner)
    steps = list(_steps(getattr(dataset, 'pipeline', None)))
    while steps:
        step = steps.pop()
        yield step
        steps += _steps(step)


def _steps(pipeline: Any) -> list[Any]:
    steps = getattr(pipeline, 'transforms', pipeline)
    return list(steps) if isinstance(steps, list | tuple) else []
