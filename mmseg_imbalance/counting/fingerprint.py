"""Fingerprints of code and data: equal in every process; other code, tables or files have another."""

from __future__ import annotations

import functools
import hashlib
import os
import re
import sys
import sysconfig
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from types import (
    BuiltinFunctionType,
    CodeType,
    FunctionType,
    MappingProxyType,
    MethodType,
    ModuleType,
    SimpleNamespace,
)
from typing import Any

import numpy as np
import torch

EDITED = ('mmcv', 'mmseg')  # users add their transforms to a clone
FRAMEWORKS = ('mmengine', 'mmseg_imbalance')  # registries and backends, which change as they are used
# what Python itself writes into a class, as documentation, addresses or line numbers
UNIMPORTANT = {
    '__abstractmethods__', '__annotate__', '__annotate_func__', '__annotations__', '__annotations_cache__',
    '__dict__', '__doc__', '__firstlineno__', '__module__', '__slotnames__', '__static_attributes__',
    '__weakref__', '_abc_impl',
}  # fmt: skip
TABLES = ('configparser', 'xml')  # whose repr does not say what they hold
CHANGING = ('numpy', 'torch')  # what these say so are generators of random numbers
ATOMS = (type(None), bool, int, float, complex, str, bytes, type(Ellipsis))


def fingerprint(values: Iterable[object], own: Iterable[str] = ()) -> str:
    """32 hexadecimal digits that depend on the values and on the code by which they work.

    Of an object its class and attributes count; of a class written by a user, its bases, methods and
    attributes; of a function its bytecode and all that it refers to: closures, defaults, tables of its module
    and of modules that it imports. Of Python's library, installed packages and MMEngine the version
    counts, of MMSegmentation and MMCV the code as well. Addresses and the order of sets do not.

    Args:
        own: names of installed packages whose code is looked into all the same.
    """
    walk = _Walk(frozenset(own))
    for value in values:
        walk.add(value)
    return walk.digest.hexdigest()[:32]


class _Walk:
    """Walks through values and all that they refer to, each object once, and adds them to a digest."""

    def __init__(self, own: frozenset[str]) -> None:
        self.own = own
        self.digest = hashlib.sha256()
        self.known: dict[int, int] = {}  # id -> number of an object that was met
        self.kept: list[object] = []  # no id is given to another object
        self.named: set[tuple[str, tuple[str, ...]]] = set()  # modules and names that were looked up in them

    def is_own(self, module: str | None) -> bool:
        return _top(module) in self.own or _is_own(module)

    def text(self, *parts: object) -> None:
        self.digest.update('\0'.join(map(str, parts)).encode('utf-8', 'surrogatepass') + b'\1')

    def add(self, value: object) -> None:
        if type(value) in ATOMS:
            self.text(type(value).__name__, repr(value))
        elif type(value) in (tuple, frozenset, CodeType):  # whether equal ones are the same is up to Python
            self.add_object(value)
        elif id(value) in self.known:
            self.text('again', self.known[id(value)])
        else:
            self.known[id(value)] = len(self.known)
            self.kept.append(value)
            self.add_object(value)

    def add_object(self, value: Any) -> None:
        if isinstance(value, FunctionType):
            self.add_function(value)
        elif isinstance(value, type):
            self.add_class(value)
        elif isinstance(value, ModuleType):
            self.text('module', value.__name__, _version(value.__name__))
        elif isinstance(value, BuiltinFunctionType | np.ufunc):
            self.text('builtin', getattr(value, '__qualname__', value.__name__))
        elif isinstance(value, CodeType):
            self.add_code(value)
        else:
            self.text('of')
            self.add(type(value))
            self.add_content(value)

    def add_content(self, value: Any) -> None:
        """What distinguishes an object from others of its class."""
        if isinstance(value, np.ndarray) and value.dtype != object:
            self.text(value.dtype, value.shape)
            self.digest.update(np.ascontiguousarray(value).tobytes())
        elif isinstance(value, np.ndarray | np.generic):
            self.add(value.tolist() if isinstance(value, np.ndarray) else repr(value))
        elif isinstance(value, staticmethod | classmethod | MethodType):
            self.add(value.__func__)
            self.add(getattr(value, '__self__', None))
        elif isinstance(value, property):
            self.add((value.fget, value.fset))
        elif isinstance(value, functools.partial):
            self.add((value.func, value.args, value.keywords))
        elif isinstance(value, functools.cached_property):
            self.add(value.func)
        elif type(value).__module__ == 'functools' and hasattr(value, '__wrapped__'):  # lru_cache
            self.add(value.__wrapped__)
        elif isinstance(value, re.Pattern):
            self.text(value.pattern, value.flags)
        elif isinstance(value, SimpleNamespace):
            self.add_attributes(value)
        elif isinstance(value, torch.Tensor):
            self.add(value.detach().cpu().numpy())
        elif isinstance(value, str | bytes | int | float | range):  # enumerations and other subclasses
            self.text(repr(value))
        elif isinstance(value, set | frozenset):
            self.text(*sorted(fingerprint([member], self.own) for member in value))
        elif isinstance(value, dict | MappingProxyType):
            self.add_all(part for item in value.items() for part in item)
            self.add_attributes(value)
        elif isinstance(value, list | tuple | deque):
            self.add_all(value)
            self.add_attributes(value)
        elif _top(type(value).__module__) in sys.stdlib_module_names and not _is_own(type(value).__module__):
            self.text(re.sub('0x[0-9a-fA-F]+', '', repr(value)))
            if _top(type(value).__module__) in TABLES:
                self.add_state(value)
        elif _top(type(value).__module__) == 'mmengine' and type(value).__name__ == 'Config':
            self.add(value.to_dict())
        elif _top(type(value).__module__) != 'mmengine' or hasattr(value, 'transforms'):
            self.add_state(value)  # but not that of registries and loggers

    def add_all(self, values: Iterable[object]) -> None:
        for value in values:
            self.add(value)
        self.text('end')

    def add_attributes(self, value: object) -> None:
        slots = [name for kind in type(value).__mro__ for name in _slots(kind) if hasattr(value, name)]
        attributes = {name: getattr(value, name) for name in slots} | getattr(value, '__dict__', {})
        for name in sorted(attributes, key=str):
            self.text(name)
            self.add(attributes[name])

    def add_state(self, value: object) -> None:
        """Attributes; of an installed class that says what pickle has to keep, as pandas' tables do, that.

        Their content may be in no attribute, and what they find out as they are used is in some.
        """
        kind: Any = type(value)
        says = any(
            getattr(kind, name, None) is not getattr(object, name, None)
            for name in ('__reduce__', '__reduce_ex__', '__getstate__')
        )
        if says and not self.is_own(kind.__module__) and _top(kind.__module__) not in CHANGING:
            with suppress(Exception):  # it cannot be pickled all the same
                made = value.__reduce_ex__(4)
                self.add([list(part) if isinstance(part, Iterator) else part for part in made])
                return
        self.add_attributes(value)

    def add_class(self, kind: type) -> None:
        self.text('class', kind.__module__, kind.__qualname__, _version(kind.__module__))
        if not self.is_own(kind.__module__):
            return
        for base in kind.__mro__[1:]:
            self.add(base)
        for name, value in sorted(vars(kind).items()):
            if name not in UNIMPORTANT:
                self.text(name)
                self.add(value)

    def add_function(self, function: FunctionType) -> None:
        self.text('function', function.__module__, function.__qualname__, _version(function.__module__))
        if not self.is_own(function.__module__):
            return
        self.add(function.__code__)
        self.add((function.__defaults__, function.__kwdefaults__))
        for cell in function.__closure__ or ():
            with suppress(ValueError):  # it is filled later
                self.add(cell.cell_contents)
        names = _code_names(function.__code__)
        space = function.__globals__
        self.add_names(function.__module__, space, names)
        for name in names:  # modules that are imported inside
            for module in (name, f'{space.get("__package__")}.{name}'):
                if name not in space and module in sys.modules:
                    self.add_names(f'{module} of {name}', {name: sys.modules[module]}, names)

    def add_names(self, module: str, space: Mapping[str, object], names: tuple[str, ...]) -> None:
        """Those of a module's objects that code names."""
        if (module, names) in self.named:
            return
        self.named.add((module, names))
        for name in names:
            if name in space and not name.startswith('__'):
                value = space[name]
                self.text(name)
                self.add(value)
                if isinstance(value, ModuleType) and self.is_own(value.__name__):
                    self.add_names(value.__name__, vars(value), names)

    def add_code(self, code: CodeType) -> None:
        self.digest.update(code.co_code)
        self.text(code.co_names, code.co_varnames, code.co_freevars)
        for constant in code.co_consts:
            self.add(constant)


def _slots(kind: type) -> list[str]:
    slots = vars(kind).get('__slots__', ())
    names = [slots] if isinstance(slots, str) else list(slots)
    return [name for name in names if name not in ('__dict__', '__weakref__')]


def _code_names(code: CodeType) -> tuple[str, ...]:
    """Global names and attributes in a function and in the functions inside it, sorted."""
    inner = [_code_names(constant) for constant in code.co_consts if isinstance(constant, CodeType)]
    # as of `import tables.roads`
    own = {part for name in code.co_names for part in (name, *name.split('.'))}
    return tuple(sorted(own.union(*inner)))


def _top(module: str | None) -> str:
    return (module or '').partition('.')[0]


def packages(part: object) -> set[str]:
    """Those of an object and of its class and bases, without Python's and MMEngine's."""
    modules = {getattr(each, '__module__', None) for each in (part, *type(part).__mro__)}
    return set(map(_top, modules)) - {*FRAMEWORKS, ''} - sys.stdlib_module_names


@functools.cache
def _is_own(module: str | None) -> bool:
    """Whether a module is somebody's own code, which may be worked on: neither Python's nor installed."""
    if _top(module) in FRAMEWORKS + EDITED:
        return _top(module) in EDITED
    file = getattr(sys.modules.get(module or ''), '__file__', None)
    if file is None:
        return _top(module) not in sys.stdlib_module_names
    path = os.path.realpath(file)
    library = os.path.realpath(sysconfig.get_path('stdlib'))
    installed = {'site-packages', 'dist-packages'} & set(path.split(os.sep))
    return not installed and not path.startswith(library + os.sep)


@functools.cache
def _version(module: str | None) -> str:
    """Of the package that a module is of, where it is not somebody's own."""
    return '' if _is_own(module) else str(getattr(sys.modules.get(_top(module)), '__version__', ''))
