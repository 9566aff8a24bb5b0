"""What the package is made of: its public names, and how its modules depend on each other."""

import ast
import importlib
import subprocess
import sys

import pytest
from conftest import REPOSITORY

import mmseg_imbalance

PACKAGE = REPOSITORY / 'mmseg_imbalance'
CORE = [
    'ops',
    'functional',
    'terms',
    'frequency',
    'weighting',
    'clustering',
    'class_weight',
    'counting',
    'scores',
]
PUBLIC = """
CITYSCAPES_TRAIN CamVidDataset ClassBalanceHook ClassFrequency ClassIoUMetric ClassWeight ClassWeightHook
CombinedWeightedLoss CrossEntropy DecisionHook EfficientNetLite0 FeatureASPPHead
FeatureDepthwiseSeparableASPPHead FeatureHead FeatureSegformerHead GeneralizedDiceLoss HardnessWeightedLoss
ImbalanceIoUMetric LogitAdjustmentHook MergedClassDataset Overlap PredictionHook QueryClassLoss
RareClassCrop RareClassPaste RareClassSampler RecallWeightedLoss ResUNet RunHook SCHEMES
SimilaritySubclassifiedLoss SkeletonRecall SkeletonRecallLoss SkeletonTubes SoftStats SubclassClustering
SubclassTable SubclassVisualizationHook SubclassifiedLoss WeightRecord WeightedCrossEntropyLoss
WeightedDiceLoss WeightedFocalLoss WeightedJaccardLoss WeightedLoss WeightedTverskyLoss __version__
class_weights count_classes similarity_weight soft_stats training_frequency
"""


def modules():
    """(name, syntax tree) of every module."""
    for path in sorted(PACKAGE.rglob('*.py')):
        parts = path.relative_to(REPOSITORY).with_suffix('').parts
        yield '.'.join(part for part in parts if part != '__init__'), ast.parse(path.read_text())


def imported(tree, at_import_only=False):
    """(module, names) of each import of this package."""
    nodes = ast.walk(tree)
    if at_import_only:
        inside = {
            id(child)
            for node in ast.walk(tree)
            if isinstance(node, ast.FunctionDef | ast.Lambda)
            for child in ast.walk(node)
        }
        nodes = [node for node in nodes if id(node) not in inside]
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and (node.module or '').split('.')[0] == 'mmseg_imbalance':
            yield node.module, [alias.name for alias in node.names]


def test_public_names_are_there_and_pinned():
    assert sorted(mmseg_imbalance.__all__) == sorted(PUBLIC.split())
    assert all(getattr(mmseg_imbalance, name) is not None for name in mmseg_imbalance.__all__)


def test_no_module_imports_a_private_name_of_another():
    private = [
        f'{name}: {module}.{alias}'
        for name, tree in modules()
        for module, names in imported(tree)
        for alias in names
        if alias.startswith('_') and not alias.startswith('__')
    ]
    assert not private


def test_no_circle_of_imports():
    trees = dict(modules())
    graph = {name: set() for name in trees}
    for name, tree in trees.items():
        for module, names in imported(tree, at_import_only=True):
            # a name may be a module; the package itself is imported by nobody but as the place of its modules
            targets = {f'{module}.{alias}' for alias in names} & trees.keys()
            graph[name] |= targets or {module}
    done, path = set(), []

    def visit(name):
        assert name not in path, f'circle: {" -> ".join([*path[path.index(name) :], name])}'
        if name in done:
            return
        path.append(name)
        for other in sorted(graph[name]):
            visit(other)
        done.add(path.pop())

    for name in graph:
        visit(name)


def without(missing, code):
    """Run code in a process in which these packages cannot be imported."""
    hide = f'sys.modules.update(dict.fromkeys({missing!r}))'
    code = f'import sys; {hide}; sys.path.insert(0, {str(REPOSITORY)!r}); {code}'
    return subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=120)


@pytest.mark.slow
@pytest.mark.parametrize('missing', [['mmseg'], ['mmseg', 'mmcv', 'mmengine']])
def test_the_core_needs_no_mmsegmentation(missing):
    names = ', '.join(f'mmseg_imbalance.{name}' for name in CORE)
    done = without(missing, f'import mmseg_imbalance, {names}; print(mmseg_imbalance.Overlap())')
    assert done.returncode == 0, done.stderr
    assert "index='dice'" in done.stdout


NEED_IT = [
    'import mmseg_imbalance; mmseg_imbalance.CombinedWeightedLoss',
    'from mmseg_imbalance import ClassWeightHook',
    *(
        f'import mmseg_imbalance.{name}'
        for name in [
            'losses',
            'registry',
            'heads',
            'hooks',
            'metrics',
            'samplers',
            'transforms',
            'datasets',
            'decisions',
            'subclass',
            'subclass_maps',
            'compat',
        ]
    ),
]


@pytest.mark.slow
def test_what_needs_it_says_how_to_install_it():
    catch = f"""
for code in {NEED_IT!r}:
    try:
        exec(code)
    except ImportError as error:
        print(error)
    else:
        raise SystemExit(code)
    for name in [name for name in sys.modules if name.startswith('mmseg_imbalance')]:
        del sys.modules[name]"""
    done = without(['mmseg', 'mmcv', 'mmengine'], catch)
    assert done.returncode == 0, done.stderr
    messages = done.stdout.splitlines()
    assert len(messages) == len(NEED_IT) == 14
    for message in messages:
        assert 'mmseg-imbalance[onedl]' in message
        assert 'mmseg-imbalance[openmmlab]' in message
    done = without(['mmseg', 'mmcv', 'mmengine'], 'import mmseg_imbalance.losses')
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith('ImportError')


def test_every_module_is_a_leaf_of_the_package():
    backend = importlib.import_module('mmseg_imbalance.ops.soft_stats')._compiled_backend
    needed = dict(
        cpu=['ops.cpu', 'ops.cpu_kernels', 'ops.lanes'], triton=['ops.triton', 'benchmark.registers']
    )
    absent = [  # the backend says why
        f'mmseg_imbalance.{module}'
        for name in needed
        if isinstance(backend(name), str)
        for module in needed[name]
    ]
    for name, _ in modules():
        if name.split('.')[-1] != '__main__' and name not in absent:
            importlib.import_module(name)


def test_a_name_with_our_scope_is_found_without_a_warning(monkeypatch):
    from mmengine.registry import MODELS as ROOT
    from mmseg.registry import MODELS

    said = []
    monkeypatch.setattr('mmengine.logging.print_log', lambda message, *_, **__: said.append(message))
    ROOT.children['mmseg_imbalance']._imported = False
    MODELS.build(dict(type='mmseg_imbalance.WeightedDiceLoss'))
    assert not [message for message in said if 'not installed' in str(message)]
