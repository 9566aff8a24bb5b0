import logging
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import REPOSITORY, Payload
from mmengine.config import Config, ConfigDict
from mmengine.logging import HistoryBuffer
from mmengine.optim import AmpOptimWrapper
from mmengine.runner import CheckpointLoader, Runner
from mmengine.utils import digit_version
from ranks import on_ranks
from torch import nn

from mmseg_imbalance.compat import CPUAmpOptimWrapper, adapt_to_cpu

weights_only = pytest.mark.skipif(
    digit_version(torch.__version__) < digit_version('2.6'),
    reason='before torch 2.6 nothing is to be registered: checkpoints are unpickled whole',
)


def test_configs_of_the_framework_are_found_under_mmseg(tmp_path):
    (tmp_path / 'config.py').write_text("_base_ = 'mmseg::_base_/models/segformer_mit-b0.py'")
    assert Config.fromfile(tmp_path / 'config.py').model.type == 'EncoderDecoder'


@weights_only
def test_a_log_history_is_loaded_as_safe_weights_only(tmp_path):
    buffer = HistoryBuffer([0.5, 0.25], [1, 2])
    torch.save(dict(loss=buffer), tmp_path / 'checkpoint.pth')
    loaded = torch.load(tmp_path / 'checkpoint.pth', weights_only=True)['loss']
    assert loaded.mean(2) == pytest.approx(buffer.mean(2))
    assert loaded.statistics('max') == 0.5


@weights_only
def test_it_still_is_after_the_framework_has_loaded_a_checkpoint(tmp_path):
    # the fork's loader takes back what it allows, whoever else had allowed it
    path = tmp_path / 'checkpoint.pth'
    torch.save(dict(loss=HistoryBuffer([0.5, 0.25], [1, 2]), score=np.float64(0.5)), path)
    for _ in range(2):
        assert CheckpointLoader.load_checkpoint(str(path), 'cpu')['score'] == 0.5
        assert torch.load(path, weights_only=True)['loss'].statistics('max') == 0.5


@weights_only
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


@weights_only
def test_a_checkpoint_that_holds_code_is_refused_and_not_run(tmp_path):
    path, mark = tmp_path / 'checkpoint.pth', tmp_path / 'run'
    torch.save(dict(state_dict={}, extra=Payload(mark)), path)
    with pytest.raises(RuntimeError, match=r'(?s)checkpoint.pth is damaged, or it holds .*mkdir'):
        CheckpointLoader.load_checkpoint(str(path), 'cpu')
    assert not mark.exists()


@weights_only
def test_a_trusted_one_is_loaded_whole_by_torchs_own_switch(tmp_path, monkeypatch):
    path, mark = tmp_path / 'checkpoint.pth', tmp_path / 'run'
    torch.save(dict(extra=Payload(mark)), path)
    monkeypatch.setenv('TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD', '1')
    with pytest.warns(UserWarning, match='TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD detected'):
        CheckpointLoader.load_checkpoint(str(path), 'cpu')
    assert mark.exists()


@weights_only
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


@weights_only
@pytest.mark.parametrize('core', ['core', '_core'])
def test_a_log_history_written_with_another_numpy_is_loaded(tmp_path, core):
    path = tmp_path / 'checkpoint.pth'
    torch.save(dict(loss=HistoryBuffer([0.5, 0.25], [1, 2])), path, _use_new_zipfile_serialization=False)
    content, here = path.read_bytes(), np.arange(2.0).__reduce__()[0].__module__
    name = f'c{here}\n'.encode()
    assert name in content
    path.write_bytes(content.replace(name, f'cnumpy.{core}.multiarray\n'.encode()))
    assert CheckpointLoader.load_checkpoint(str(path), 'cpu')['loss'].statistics('max') == 0.5


@weights_only
def test_a_checkpoint_that_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match='there is no such checkpoint'):
        CheckpointLoader.load_checkpoint(str(tmp_path / 'nothing.pth'), 'cpu')


def test_on_a_cpu_amp_becomes_bfloat16_and_nothing_else_changes(monkeypatch):
    monkeypatch.setattr('mmseg_imbalance.compat.get_device', lambda: 'cpu')
    cfg = Config(dict(optim_wrapper=dict(type='AmpOptimWrapper', loss_scale='dynamic', clip_grad=None)))
    adapt_to_cpu(cfg)
    assert cfg.to_dict() == dict(optim_wrapper=dict(type='CPUAmpOptimWrapper', clip_grad=None))
    adapt_to_cpu(Config(dict(optim_wrapper=None)))  # as configs that only test have it
    for kind, other in (
        (AmpOptimWrapper, CPUAmpOptimWrapper),
        ('mmengine.AmpOptimWrapper', 'CPUAmpOptimWrapper'),
    ):
        cfg = Config(dict(optim_wrapper=dict(type=kind)))  # as in Python configs, and with a scope
        adapt_to_cpu(cfg)
        assert cfg.optim_wrapper.type == other


class TwoParts(nn.Module):
    """The second part belongs to every other batch alone; the buffer is each rank's own."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(2, 1), nn.Linear(1, 1)
        self.register_buffer('seen', torch.zeros(()))

    def forward(self, x, both):
        self.seen += dist.get_rank()
        y = self.first(x)
        return (self.second(y) if both else y).sum()


def wrapped_on_a_rank(options):
    """What MMEngine's runner makes of the adapted config: two steps, options and buffer of the wrapper."""
    os.environ['LOCAL_RANK'] = str(dist.get_rank())
    norm = dict(type='SyncBN', requires_grad=True)
    cfg = Config(
        dict(launcher='pytorch', sync_bn='torch', model=dict(heads=[dict(norm_cfg=norm)]), **options)
    )
    adapt_to_cpu(cfg)
    runner = SimpleNamespace(cfg=cfg, distributed=True, logger=logging.getLogger('test'))
    model = Runner.wrap_model(runner, cfg.model_wrapper_cfg, TwoParts())
    for both in (False, True):
        model(torch.ones(1, 2), both).backward()
    kinds = model.find_unused_parameters, model.broadcast_buffers
    return type(model).__name__, *kinds, model.module.seen.item(), cfg.model.heads[0].norm_cfg.type


@pytest.mark.slow
def test_ranks_on_a_cpu_are_wrapped_as_mmengine_does_on_gpus(monkeypatch):
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '')  # of the ranks, which are processes of their own
    name = 'MMDistributedDataParallel'
    for options in (
        dict(find_unused_parameters=True),
        dict(find_unused_parameters=True, model_wrapper_cfg=None),
        dict(model_wrapper_cfg=dict(find_unused_parameters=True, broadcast_buffers=False, device_ids=[0])),
    ):
        ranks = on_ranks(2, wrapped_on_a_rank, options)
        assert ranks == [(name, True, False, 2.0 * rank, 'BN') for rank in range(2)], options
    own = dict(type=name, find_unused_parameters=True)  # PyTorch's defaults where it says nothing
    ranks = on_ranks(2, wrapped_on_a_rank, dict(model_wrapper_cfg=own))
    assert [rank[:3] for rank in ranks] == [(name, True, True)] * 2
    errors = on_ranks(2, wrapped_on_a_rank, dict(find_unused_parameters=False))
    assert all('find_unused_parameters=True' in str(error) for error in errors)


def test_nothing_of_mmcv_ops_is_imported():
    sources = [path.read_text() for path in (REPOSITORY / 'mmseg_imbalance').rglob('*.py')]
    assert len(sources) > 10
    assert not any('mmcv.ops' in source for source in sources)
