import os

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from mmengine.config import Config, ConfigDict
from mmengine.logging import HistoryBuffer
from mmengine.runner import CheckpointLoader
from mmengine.utils import digit_version

from mmseg_imbalance.compat import adapt_to_cpu

needs_safe_globals = pytest.mark.skipif(
    digit_version(torch.__version__) < digit_version('2.6'),
    reason='before torch 2.6 nothing is to be registered: checkpoints are unpickled whole',
)


def test_configs_of_the_framework_are_found_under_mmseg(tmp_path):
    (tmp_path / 'config.py').write_text("_base_ = 'mmseg::_base_/models/segformer_mit-b0.py'")
    assert Config.fromfile(tmp_path / 'config.py').model.type == 'EncoderDecoder'


@needs_safe_globals
def test_a_log_history_is_loaded_as_safe_weights_only(tmp_path):
    buffer = HistoryBuffer([0.5, 0.25], [1, 2])
    torch.save(dict(loss=buffer), tmp_path / 'checkpoint.pth')
    loaded = torch.load(tmp_path / 'checkpoint.pth', weights_only=True)['loss']
    assert loaded.mean(2) == pytest.approx(buffer.mean(2))
    assert loaded.statistics('max') == 0.5


@needs_safe_globals
def test_it_still_is_after_the_framework_has_loaded_a_checkpoint(tmp_path):
    # the fork's loader takes back what it allows, whoever else had allowed it
    path = tmp_path / 'checkpoint.pth'
    torch.save(dict(loss=HistoryBuffer([0.5, 0.25], [1, 2]), score=np.float64(0.5)), path)
    for _ in range(2):
        assert CheckpointLoader.load_checkpoint(str(path), 'cpu')['score'] == 0.5
        assert torch.load(path, weights_only=True)['loss'].statistics('max') == 0.5


@needs_safe_globals
def test_that_opens_no_way_to_other_attributes(tmp_path):
    class Foreign:
        def __reduce__(self):
            return getattr, (HistoryBuffer, '__init__')

    class Escaping:
        def __reduce__(self):
            return getattr, (Foreign(), '__globals__')

    torch.save(Escaping(), tmp_path / 'checkpoint.pth')
    with pytest.raises(Exception, match='__globals__'):
        torch.load(tmp_path / 'checkpoint.pth', weights_only=True)


class Payload:
    """A pickle of it writes a file when it is loaded whole."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


@needs_safe_globals
def test_a_checkpoint_that_holds_code_is_refused_and_not_run(tmp_path):
    path, mark = tmp_path / 'checkpoint.pth', tmp_path / 'run'
    torch.save(dict(state_dict={}, extra=Payload(mark)), path)
    with pytest.raises(RuntimeError, match=r'(?s)checkpoint.pth is damaged, or it holds .*mkdir'):
        CheckpointLoader.load_checkpoint(str(path), 'cpu')
    assert not mark.exists()


@needs_safe_globals
def test_a_trusted_one_is_loaded_whole_by_torchs_own_switch(tmp_path, monkeypatch):
    path, mark = tmp_path / 'checkpoint.pth', tmp_path / 'run'
    torch.save(dict(extra=Payload(mark)), path)
    monkeypatch.setenv('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD', '1')
    with pytest.warns(UserWarning, match='TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD detected'):
        CheckpointLoader.load_checkpoint(str(path), 'cpu')
    assert mark.exists()


@needs_safe_globals
def test_what_checkpoints_of_ordinary_runs_hold_is_loaded(tmp_path):
    path = tmp_path / 'checkpoint.pth'
    meta = dict(
        palette=np.zeros((2, 3), np.uint8),
        best=np.float32(0.5),
        names=np.array(['a', 'b']),
        done=np.bool_(True),
        groups=ConfigDict(tail=['a'], nested=dict(x=1)),
        part=slice(1, 2),
        logs=dict(loss=HistoryBuffer(np.ones(3), np.ones(3))),
    )
    torch.save(dict(meta=meta), path)
    loaded = CheckpointLoader.load_checkpoint(str(path), 'cpu')['meta']
    assert loaded['best'] == np.float32(0.5)
    assert loaded['names'].tolist() == ['a', 'b']
    assert loaded['groups'].nested.x == 1
    assert loaded['palette'].shape == (2, 3)
    assert loaded['logs']['loss'].current() == 1


@needs_safe_globals
@pytest.mark.parametrize('core', ['core', '_core'])
def test_a_log_history_written_with_another_numpy_is_loaded(tmp_path, core):
    path = tmp_path / 'checkpoint.pth'
    torch.save(dict(loss=HistoryBuffer([0.5, 0.25], [1, 2])), path, _use_new_zipfile_serialization=False)
    content, here = path.read_bytes(), np.arange(2.0).__reduce__()[0].__module__
    name = f'c{here}\n'.encode()
    assert name in content
    path.write_bytes(content.replace(name, f'cnumpy.{core}.multiarray\n'.encode()))
    assert CheckpointLoader.load_checkpoint(str(path), 'cpu')['loss'].statistics('max') == 0.5


@needs_safe_globals
def test_a_checkpoint_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match='there is no such checkpoint'):
        CheckpointLoader.load_checkpoint(str(tmp_path / 'nothing.pth'), 'cpu')


@pytest.mark.skipif(torch.cuda.is_available(), reason='there is a GPU, and nothing to adapt')
def test_on_a_cpu_amp_becomes_bfloat16_and_nothing_else_changes():
    cfg = Config(dict(optim_wrapper=dict(type='AmpOptimWrapper', loss_scale='dynamic', clip_grad=None)))
    adapt_to_cpu(cfg)
    assert cfg.to_dict() == dict(optim_wrapper=dict(type='CPUAmpOptimWrapper', clip_grad=None))
    adapt_to_cpu(Config(dict(optim_wrapper=None)))  # as configs that only test have it


def test_nothing_of_mmcv_ops_is_imported():
    sources = [path.read_text() for path in (REPOSITORY / 'mmseg_imbalance').rglob('*.py')]
    assert len(sources) > 10
    assert not any('mmcv.ops' in source for source in sources)
