"""A fingerprint changes with all that the labels can depend on, and with nothing else."""

import functools
import importlib
import os
import pickle
import random
import re
import subprocess
import sys
import types
from collections import OrderedDict, deque
from concurrent.futures import ThreadPoolExecutor
from configparser import ConfigParser
from enum import Enum
from fractions import Fraction
from pathlib import Path
from typing import ClassVar
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from mmcv.transforms import BaseTransform
from mmengine.config import Config, ConfigDict
from mmseg.datasets.transforms import LoadAnnotations

from mmseg_imbalance.counting import fingerprint as fingerprint_module
from mmseg_imbalance.counting.fingerprint import fingerprint, packages


def of(value):
    return fingerprint([value])


DIFFERENT = [
    None,
    0,
    False,
    0.0,
    '0',
    b'0',
    (),
    [],
    {},
    set(),
    (0,),
    [0],
    [[0]],
    {0},
    {0: 1},
    {1: 0},
    {0: 1, 2: 3},
    {2: 3, 0: 1},  # a map that is applied in its order
    OrderedDict({0: 1}),
    ConfigDict(a=1),
    deque([0]),
    range(3),
    range(10**12),
    np.zeros(3),
    np.zeros(3, int),
    np.zeros((3, 1)),
    np.ones(3),
    np.array([0, None]),
    np.float32(0),
    torch.zeros(3),
    Path('a'),
    Path('b'),
    Fraction(1, 2),
    Fraction(1, 3),
    functools.partial(max, 1),
    functools.partial(max, 2),
    functools.partial(min, 1),
    np.add,
    np.subtract,
    re.compile('a' * 300 + 'b'),
    re.compile('a' * 300 + 'c'),
    types.SimpleNamespace(a={1: np.arange(2000)}),
    types.SimpleNamespace(a={1: np.arange(2000) // 1999 * 1000 + np.arange(2000)}),
    types.MappingProxyType({1: 2}),
    bytearray(b'1'),
    # whose attributes and repr do not say what they hold
    Config(dict(a=1)),
    Config(dict(a=2)),
    ElementTree.fromstring('<a b="1"/>'),
    ElementTree.fromstring('<a b="2"/>'),
    ConfigParser({'a': '1'}),
    ConfigParser({'a': '2'}),
    len,
    os.path.join,
    LoadAnnotations(),
    LoadAnnotations(imdecode_backend='cv2'),
    LoadAnnotations(reduce_zero_label=True),
    LoadAnnotations(backend_args=dict(backend='local')),
    LoadAnnotations,
    BaseTransform,
]


def test_values_that_differ_have_fingerprints_that_differ():
    assert len({of(value) for value in DIFFERENT}) == len(DIFFERENT)
    assert of(DIFFERENT) == of(list(DIFFERENT))
    assert [of(value) for value in DIFFERENT] == [of(value) for value in DIFFERENT]


class Table:
    """As a table of pandas: none of its attributes is what it holds, one is what it has looked up."""

    held: ClassVar[dict] = {}

    def __init__(self, *values):
        self.held[id(self)] = values

    def __reduce__(self):
        return tuple, (self.held[id(self)],)


def test_what_an_installed_object_holds_out_of_sight_counts_but_not_what_it_remembers(monkeypatch):
    monkeypatch.setattr(fingerprint_module, '_is_own', lambda module: module != Table.__module__)
    first, second, same = Table(7, 1), Table(7, 2), Table(7, 1)
    assert of(first) == of(same) != of(second)
    same.cache = {7: 1}
    assert of(first) == of(same)


def test_an_object_that_was_pickled_is_the_same():
    transform = LoadAnnotations()
    before = of(Nothing), of(transform)
    pickle.dumps(Nothing()), pickle.dumps(transform)  # leaves a note in the class
    assert (of(Nothing), of(transform)) == before


class Nothing:
    pass


def test_what_changes_as_it_is_used_is_no_other_object():
    numbers, other, pool = np.random.default_rng(0), random.Random(0), ThreadPoolExecutor(1)
    before = of(numbers), of(other), of(pool)
    numbers.random(), other.gauss(0, 1), pool.submit(len, '').result()
    assert (of(numbers), of(other), of(pool)) == before


def module(text, name='somebodys_module', **names):
    """A module of somebody's own, made of text."""
    made = types.ModuleType(name)
    vars(made).update(names)
    exec(compile(text, f'{name}.py', 'exec'), vars(made))
    sys.modules[name] = made
    return made


CODE = """
import functools
import numpy as np

FACTOR = 2
LABELS = {'road', 'sky', 'car'}

class Kind:
    limit = 3
    names = frozenset(['a', 'b'])

    def __init__(self):
        self.values = [1]

    @property
    def doubled(self):
        return self.limit * 2

    @functools.cached_property
    def kept(self):
        return self.limit - 7

    @staticmethod
    def fixed(x):
        return x + 1

    @classmethod
    def made(cls):
        return cls.limit

class Slots:
    __slots__ = ('a', '__weakref__')

    def __init__(self):
        self.a = 5

def outer(offset):
    def inner(x, *, scale=3):
        return [y * scale + offset for y in x if y not in {7, 8, 9}]
    return inner

@functools.lru_cache
def cached(x):
    return x * 10

def helper(x):
    return np.where(x > FACTOR, x, 0)

def uses(x):
    '''What it does.'''
    return helper(x) + len(LABELS)  # a comment

def imports(x):
    from somebodys_tables import MAP
    return MAP[x]

def again(n):
    return again(n - 1) if n else 0

kind, slots, closure = Kind(), Slots(), outer(4)
"""
PARTS = ('Kind', 'kind', 'slots', 'closure', 'cached', 'uses', 'imports', 'again')
EDITS = {
    'FACTOR = 2': ('FACTOR = 5', {'uses'}),
    "'sky'": ("'sea'", {'uses'}),
    'limit = 3': ('limit = 4', {'Kind', 'kind'}),
    "['a', 'b']": ("['a', 'c']", {'Kind', 'kind'}),
    'self.values = [1]': ('self.values = [2]', {'Kind', 'kind'}),
    'self.limit * 2': ('self.limit * 3', {'Kind', 'kind'}),
    'self.limit - 7': ('self.limit - 8', {'Kind', 'kind'}),
    'x + 1': ('x + 2', {'Kind', 'kind'}),
    'return cls.limit': ('return cls.limit, 1', {'Kind', 'kind'}),
    'self.a = 5': ('self.a = 6', {'slots'}),
    'scale=3': ('scale=4', {'closure'}),
    '{7, 8, 9}': ('{7, 8}', {'closure'}),
    'outer(4)': ('outer(5)', {'closure'}),
    'x * 10': ('x * 11', {'cached'}),
    'x, 0)': ('x, 1)', {'uses'}),
    'again(n - 1)': ('again(n - 2)', {'again'}),
    'MAP[x]': ('MAP[x + 1]', {'imports'}),
    '# a comment': ('# another comment', set()),
    'FACTOR = 2\n': ('FACTOR = 2\nNEW = 7\n\n\n', set()),
}


@pytest.fixture(autouse=True)
def no_modules_stay():
    yield
    for name in [name for name in sys.modules if name.startswith('somebodys_')]:
        del sys.modules[name]


@pytest.mark.parametrize('edit', EDITS)
def test_an_edit_of_code_changes_the_fingerprints_of_what_uses_it(edit):
    new, changed = EDITS[edit]
    module('MAP = {0: 1}', 'somebodys_tables')
    before = {part: of(getattr(module(CODE), part)) for part in PARTS}
    assert {part: of(getattr(module(CODE), part)) for part in PARTS} == before
    assert edit in CODE
    edited = module(CODE.replace(edit, new))
    after = {part: of(getattr(edited, part)) for part in PARTS}
    assert {part for part in PARTS if before[part] != after[part]} == changed


@pytest.mark.parametrize('way', ['from x import', 'import x', 'import x as', 'inside', 'a package'])
def test_tables_of_other_modules_of_somebodys_own_count(way):
    lines = {
        'from x import': ('from somebodys_tables import MAP', 'MAP[x]'),
        'import x': ('import somebodys_tables', 'somebodys_tables.MAP[x]'),
        'import x as': ('import somebodys_tables as t', 't.MAP[x]'),
        'inside': ('', '(__import__("os"), MAP[x])'),
        'a package': ('import somebodys_package as p', 'p.tables.MAP[x]'),
    }
    head, expression = lines[way]
    body = '    from somebodys_tables import MAP\n' if way == 'inside' else ''
    seen = set()
    for value in (1, 1, 2):
        tables = module(f'MAP = {{0: {value}}}\nOTHER = object()', 'somebodys_tables')
        module('', 'somebodys_package', tables=tables)
        seen.add(of(module(f'{head}\ndef f(x):\n{body}    return {expression}').f))
    assert len(seen) == 2


def test_modules_that_import_each_other_come_to_an_end():
    first = module('', 'somebodys_first')
    second = module('def g(): return somebodys_first.f', 'somebodys_second', somebodys_first=first)
    text = 'def f(): return somebodys_second.g, somebodys_second.somebodys_first.somebodys_second'
    first.somebodys_second = second
    exec(text, vars(first))
    assert of(first.f) == of(first.f)


def test_objects_that_refer_to_each_other_come_to_an_end():
    first, second = [1], [2]
    first.append(second)
    second.append(first)
    assert of(first) == of(first) != of(second)
    node = types.SimpleNamespace(a=1)
    node.self = node
    assert of(node) == of(node)


def test_an_installed_package_counts_by_its_version_unless_it_is_looked_into(tmp_path, monkeypatch):
    folder = tmp_path / 'site-packages'
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    seen = {}
    for value in (1, 2):
        name = f'installed_package_{value}'
        text = (
            f'TABLE = {value}\nclass Loader:\n    def f(self): return TABLE\n'
            'Loader.__module__ = "installed"\ndef function(): return TABLE\nfunction.__module__ = "installed"'
        )
        (folder / f'{name}.py').write_text(text)
        monkeypatch.setitem(sys.modules, 'installed', importlib.import_module(name))
        loader = sys.modules['installed'].Loader()
        loader.f.__func__.__module__ = 'installed'
        fingerprint_module._is_own.cache_clear()
        function = sys.modules['installed'].function
        assert packages(loader) == packages(function) == {'installed'}
        seen[value] = [of(loader), of(function)], [fingerprint([x], packages(x)) for x in (loader, function)]
    fingerprint_module._is_own.cache_clear()
    assert seen[1][0] == seen[2][0]
    assert all(one != two for one, two in zip(seen[1][1], seen[2][1], strict=True))


LOADER_IN_A_CLONE = """
from mmcv.transforms import LoadAnnotations
from mmseg.datasets.somebodys_tables import MORE

TABLE = {{1: {table}}}

class Loader(LoadAnnotations):
    def transform(self, results):
        return TABLE, MORE
"""


@pytest.mark.parametrize('clone', ['mmseg', 'mmcv'])
def test_a_loader_in_a_clone_of_a_framework_counts_with_its_tables(clone, monkeypatch):
    seen = []
    for table, more in ((1, 1), (1, 1), (2, 1), (1, 2)):
        tables = module(f'MORE = {{1: {more}}}', 'mmseg.datasets.somebodys_tables')
        monkeypatch.setitem(sys.modules, 'mmseg.datasets.somebodys_tables', tables)
        made = module(LOADER_IN_A_CLONE.format(table=table), f'{clone}.transforms.somebodys_loader')
        monkeypatch.setitem(sys.modules, made.__name__, made)
        loader = made.Loader()
        seen.append(of(loader))
    assert seen[0] == seen[1]
    assert len(set(seen)) == 3


def test_an_edit_of_a_stock_loader_counts(monkeypatch):
    def load(self, results):
        return results

    before = of(LoadAnnotations())
    assert of(LoadAnnotations()) == before
    load.__module__ = LoadAnnotations.__module__
    monkeypatch.setattr(LoadAnnotations, '_load_seg_map', load)
    assert of(LoadAnnotations()) != before


class Colour(Enum):
    RED = 1
    BLUE = 2


def test_members_of_an_enumeration_differ():
    assert of(Colour.RED) != of(Colour.BLUE)
    assert of(Colour.RED) == of(Colour.RED)


def test_a_class_made_here_and_its_base_count():
    def make(value):
        class Base(LoadAnnotations):
            table = {1: value}

        class Loader(Base):
            pass

        return Loader()

    assert of(make(1)) == of(make(1)) != of(make(2))


SHOW = """
import sys
sys.path.insert(0, {tests!r})
import test_fingerprint as t
t.module('MAP = {{0: 1}}', 'somebodys_tables')
made = t.module(t.CODE)
print(t.fingerprint([getattr(made, part) for part in t.PARTS] + [{{'a', 'b', 'c'}}, t.DIFFERENT]))
"""


@pytest.mark.slow
def test_processes_agree_on_a_fingerprint():
    seen = set()
    for seed in range(2):
        done = subprocess.run(
            [sys.executable, '-c', SHOW.format(tests=str(Path(__file__).parent))],
            env=os.environ | dict(PYTHONHASHSEED=str(seed), PYTHONPATH=str(Path(__file__).parents[1])),
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        seen.add(done.stdout.splitlines()[-1])
    assert len(seen) == 1
