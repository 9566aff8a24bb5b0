"""What the two stacks of MMSegmentation, and training without a GPU, need; all by registration.

- The fork is installed as onedl-mmsegmentation, but MMEngine looks for the configs of ``mmseg::`` bases in
  the distribution mmsegmentation. A registration in MMEngine's table of names mends it.
- Upstream cannot resume with torch >= 2.6, which refuses to unpickle MMEngine's log history unless its
  classes are registered as safe.
- The fork unpickles whole what torch refuses to load as weights alone, and so runs the code in it. A loader
  of local checkpoints that leaves it at torch's refusal is registered in place of MMEngine's.
- MMEngine's distributed wrapper and SyncBN ask for a GPU, and so does its mixed precision.
"""

import os
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, distribution
from pickle import UnpicklingError

from mmseg_imbalance.registry import OPTIM_WRAPPERS

import numpy as np
import torch
import torch.distributed as dist
from mmengine.config import Config, ConfigDict
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.device import get_device
from mmengine.logging import HistoryBuffer
from mmengine.optim import OptimWrapper
from mmengine.registry import MODEL_WRAPPERS
from mmengine.runner import CheckpointLoader
from mmengine.utils import digit_version
from torch.nn.parallel import DistributedDataParallel

from mmseg_imbalance.config_fields import type_name


def _history_method(owner: object, name: str) -> object:
    """What the pickle of a log history needs of ``getattr``, and no more of it."""
    if owner is not HistoryBuffer or name not in vars(HistoryBuffer):
        raise UnpicklingError(f'a log history has no use for {name!r} of {owner!r}')
    return getattr(owner, name)


def load_from_local(filename: str, map_location: object = None) -> object:
    """A local checkpoint; torch loads no more than weights and what is registered as safe."""
    filename = os.path.expanduser(filename)
    if not os.path.isfile(filename):
        raise FileNotFoundError(f'{filename}: there is no such checkpoint. Check the path.')
    try:
        return torch.load(filename, map_location=map_location)
    except UnpicklingError as error:
        raise RuntimeError(
            f'{filename} is damaged, or it holds more than weights and loading it could run code. If you '
            f'trust it, set TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1 in the environment: all of it loads. {error}'
        ) from error
    except (EOFError, KeyError) as error:  # of an empty file, of some texts
        raise RuntimeError(f'{filename} is no checkpoint that torch can read: {error!r}') from error


def _register() -> None:
    try:
        distribution('mmsegmentation')
    except PackageNotFoundError:
        MODULE2PACKAGE['mmseg'] = 'onedl-mmsegmentation'
    MODULE2PACKAGE['mmseg_imbalance'] = 'mmseg-imbalance'  # configs of a wheel as bases
    if digit_version(torch.__version__) >= digit_version('2.6'):
        values = np.arange(2.0), np.arange(2)
        reconstruct = values[0].__reduce__()[0]
        scalar = values[0][0].__reduce__()[0]
        dtypes = {type(np.dtype(code)) for code in np.typecodes['All'] if code != 'O'}
        # a data set's meta information has arrays and dictionaries of a config
        safe = {HistoryBuffer, ConfigDict, slice, reconstruct, scalar, np.ndarray, np.dtype, *dtypes}
        # by name: the fork's loader registers most of them as they are for each load, and takes them back
        named = [(value, f'{value.__module__}.{value.__qualname__}') for value in safe]
        for core in ('core', '_core'):  # NumPy 2 has other names than those before
            named += [(value, f'numpy.{core}.multiarray.{value.__name__}') for value in (reconstruct, scalar)]
        torch.serialization.add_safe_globals([*named, (_history_method, 'builtins.getattr')])
        CheckpointLoader.register_scheme(prefixes='', loader=load_from_local, force=True)


_register()


@OPTIM_WRAPPERS.register_module()
class CPUAmpOptimWrapper(OptimWrapper):
    """Mixed precision on CPU: bfloat16 autocast, and no loss scaling, since its range is float32's."""

    @contextmanager
    def optim_context(self, model: torch.nn.Module):
        with super().optim_context(model), torch.autocast('cpu', torch.bfloat16):
            yield


def adapt_to_cpu(cfg: Config) -> None:
    """Make a config, in place, run where there is no GPU; with a launcher, join its processes by gloo."""
    if get_device() != 'cpu':
        return
    if type_name(cfg.get('optim_wrapper') or {}) == 'AmpOptimWrapper':
        named = isinstance(cfg.optim_wrapper.type, str)  # not the class itself, as in Python configs
        cfg.optim_wrapper.type = 'CPUAmpOptimWrapper' if named else CPUAmpOptimWrapper
        for option in ('loss_scale', 'dtype', 'use_fsdp'):
            cfg.optim_wrapper.pop(option, None)
    if cfg.get('launcher', 'none') == 'none':
        return
    if not dist.is_initialized():
        dist.init_process_group('gloo')
    wrapper = cfg.get('model_wrapper_cfg')
    if wrapper is None:  # MMEngine's own, which it makes itself for GPUs alone
        unused = cfg.get('find_unused_parameters', False)
        wrapper = dict(broadcast_buffers=False, find_unused_parameters=unused)
    wrapper.setdefault('type', 'MMDistributedDataParallel')
    kind = MODEL_WRAPPERS.get(wrapper['type']) if isinstance(wrapper['type'], str) else wrapper['type']
    if isinstance(kind, type) and issubclass(kind, DistributedDataParallel):
        wrapper['device_ids'] = None
    cfg.model_wrapper_cfg = wrapper
    cfg.sync_bn = None
    _without_sync_bn(cfg.model)


def _without_sync_bn(node: object) -> None:
    if isinstance(node, dict):
        if type_name(node) in ('SyncBN', 'MMSyncBN', 'SyncBatchNorm'):
            node['type'] = 'BN'
        node = list(node.values())
    if isinstance(node, list | tuple):
        for child in node:
            _without_sync_bn(child)
