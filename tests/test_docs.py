"""What the documentation says is so: its commands run, its configs parse, the errors it explains exist."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

from mmseg_imbalance.registry import DATA_SAMPLERS, HOOKS, METRICS, MODELS, TRANSFORMS

import pytest
from conftest import REPOSITORY
from mmengine.config import Config

DOCS = REPOSITORY / 'docs'
PAGES = sorted(DOCS.glob('*.md'))
REGISTRIES = (DATA_SAMPLERS, HOOKS, METRICS, MODELS, TRANSFORMS)
# what Python and pickle ask for, and no user meets
INTERNAL = {'AttributeError', 'NotImplementedError', 'UnpicklingError'}


def code_blocks(path):
    """(info string, text) of each fenced block of a page, in order."""
    return re.findall(r'^```([^\n{]*)\n(.*?)^```$', path.read_text(encoding='utf-8'), re.M | re.S)


def blocks_of(path, language):
    return [text for info, text in code_blocks(path) if info == language]


def file_name(text):
    """The name in the first line of a Python block that is a file, `# NAME.py`."""
    found = re.match(r'# (\w+\.py)\n', text)
    return found and found[1]


def is_literal(node):
    try:
        ast.literal_eval(node)
    except ValueError:
        return False
    return True


@pytest.mark.slow
@pytest.mark.parametrize('page', ['first-run.md', 'extending.md'])
def test_a_page_runs_from_top_to_bottom(page, tmp_path):
    """Python blocks that name a file are saved under that name; bash blocks run, in order."""
    (tmp_path / 'tools').symlink_to(REPOSITORY / 'tools')
    paths = [str(Path(sys.executable).parent), os.environ['PATH']]
    environment = os.environ | dict(
        PATH=os.pathsep.join(paths),
        PYTHONPATH=os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get('PYTHONPATH')])),
        MMSEG_IMBALANCE_CACHE=str(tmp_path / 'cache'),
    )
    commands = 0
    for info, text in code_blocks(DOCS / page):
        if info == 'python' and file_name(text):
            (tmp_path / file_name(text)).write_text(text, encoding='utf-8')
        elif info == 'bash':
            done = subprocess.run(
                ['bash', '-euo', 'pipefail', '-c', text],
                cwd=tmp_path,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            assert done.returncode == 0, f'{text}\n{done.stdout[-3000:]}'
            commands += 1
    assert commands >= 4
    if page == 'first-run.md':
        assert (tmp_path / 'classes.png').exists()
        assert (tmp_path / 'work_dirs' / 'balanced' / 'class_weights.json').exists()
        text = (tmp_path / 'comparison' / 'comparison.md').read_text(encoding='utf-8')
        assert 'post' in text
        assert 'Left out' not in text


@pytest.mark.parametrize('path', [REPOSITORY / 'README.md', *PAGES], ids=lambda path: path.name)
def test_python_blocks_that_are_no_files_are_parts_of_configs(path, tmp_path):
    file = tmp_path / 'config.py'
    for text in blocks_of(path, 'python'):
        if not file_name(text):
            file.write_text(text, encoding='utf-8')
            cfg = Config.fromfile(file, import_custom_modules=False)
            assert cfg.to_dict(), text


@pytest.mark.parametrize('path', [REPOSITORY / 'README.md', *PAGES], ids=lambda path: path.name)
def test_losses_hooks_and_heads_in_code_blocks_exist(path):
    """Every `type=` of this package's naming is registered, and every loss can be built as written."""
    registered = {name for registry in REGISTRIES for name in registry.module_dict}
    for text in blocks_of(path, 'python'):
        if file_name(text):
            continue
        for node in ast.walk(ast.parse(text)):
            if not isinstance(node, ast.Call):
                continue
            options = {k.arg: ast.literal_eval(k.value) for k in node.keywords if is_literal(k.value)}
            kind = str(options.pop('type', ''))
            if kind.endswith('Loss') and kind in MODELS.module_dict:
                options.pop('_delete_', None)
                if str(options.get('class_weight')).endswith('.json'):
                    del options['class_weight']
                assert MODELS.build(dict(type=kind, **options)) is not None
            elif re.match('Weighted|Combined|Feature|RareClass|Imbalance|Class[WB]|Subclass', kind):
                assert kind in registered, kind


def test_the_api_reference_names_every_module():
    """But those that hold no code for users: of names, of commands, and the scripts behind them."""
    modules = {path.stem for path in REPOSITORY.glob('mmseg_imbalance/[!_]*.py')}
    listed = set(re.findall(r'^   mmseg_imbalance\.(\w+)', (DOCS / 'api' / 'index.md').read_text(), re.M))
    assert modules - listed <= {'registry', 'shipped', 'version'}


def test_readme_has_at_most_150_lines():
    assert len((REPOSITORY / 'README.md').read_text(encoding='utf-8').splitlines()) <= 150


@pytest.mark.parametrize('path', [REPOSITORY / 'README.md', REPOSITORY / 'CONTRIBUTING.md'])
def test_links_within_the_repository_lead_to_files(path):
    links = re.findall(r'\]\(([^)#]+)(?:#[^)]*)?\)', path.read_text(encoding='utf-8'))
    local = [link for link in links if '://' not in link]
    assert local
    assert [link for link in local if not (path.parent / link).exists()] == []


def pattern(node):
    """The text of a string expression, with a placeholder for what is filled in; None for other code."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return ''.join(part.value if isinstance(part, ast.Constant) else '…' for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        left, right = pattern(node.left), pattern(node.right)
        return None if left is None or right is None else left + right
    return None


def sources():
    return sorted([*REPOSITORY.glob('mmseg_imbalance/**/*.py'), *REPOSITORY.glob('tools/*.py')])


def messages():
    """(file, line, text) of every error and warning that the package and its tools can give."""
    speaking = ('warn', 'warning', '_warn', 'warn_once', 'error', 'exit', 'print_log')
    for path in sources():
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
            call = node.exc if isinstance(node, ast.Raise) else node
            if not isinstance(call, ast.Call):
                continue
            name = getattr(call.func, 'attr', getattr(call.func, 'id', ''))
            if name in INTERNAL or (not isinstance(node, ast.Raise) and name not in speaking):
                continue
            for argument in call.args:
                text = pattern(argument)
                if text is not None and len(text.replace('…', '').split()) >= 3:
                    yield path, node.lineno, text


def explained():
    """The messages that the page explains: the terms of its definition lists."""
    return re.findall(r'^`(.+)`\n: ', (DOCS / 'questions.md').read_text(encoding='utf-8'), re.M)


def says(text, fragment):
    """Whether a message holds the fragment, in which … stands for what is filled in."""
    if len(fragment.replace('…', '').split()) < 3:  # too general to be looked for inside a message
        return text == fragment
    parts = fragment.split('…')
    return max(parts, key=len) in text and re.search('.*'.join(map(re.escape, parts)), text, re.S) is not None


def test_every_error_that_the_page_explains_exists():
    texts = set()
    for path in sources():
        texts |= {pattern(node) for node in ast.walk(ast.parse(path.read_text(encoding='utf-8')))} - {None}
    texts = [text for text in texts if len(text) > 10]
    fragments = explained()
    assert len(fragments) > 100
    assert [fragment for fragment in fragments if not any(says(text, fragment) for text in texts)] == []


def test_the_page_explains_every_error():
    fragments = explained()
    missing = [
        f'{path.name}:{line}: {text}'
        for path, line, text in messages()
        if not any(says(text, fragment) for fragment in fragments)
    ]
    assert missing == []
