"""The feature heads in MMEngine's distributed wrapper, beside the framework's heads on the same ranks."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from mmengine.model import MMDistributedDataParallel
from mmengine.optim import OptimWrapper
from ranks import on_ranks
from test_heads import MODEL_CONFIGS, small_model, train_batch

pytestmark = pytest.mark.slow


def train_step(name, feature):
    """The log of a step on two images of this rank, and the weights after it."""
    torch.set_num_threads(1)
    model = small_model(name, feature)  # with plain BN, as SyncBN is for GPUs alone
    for module in model.modules():
        if hasattr(module, 'sync_region'):
            module.region_reduction, module.sync_region = 'batch', True
    model = MMDistributedDataParallel(model, device_ids=None)
    optimizer = OptimWrapper(torch.optim.SGD(model.parameters(), lr=0.1))
    images = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
    share = {key: value[images] for key, value in train_batch(11, images=4).items()}
    torch.manual_seed(dist.get_rank())  # dropout
    log = {key: float(value) for key, value in model.train_step(share, optimizer).items()}
    return log, {key: value.numpy() for key, value in model.module.state_dict().items()}


def train_all():
    return {(name, feature): train_step(name, feature) for name in MODEL_CONFIGS for feature in (False, True)}


def test_two_ranks_train_as_with_the_frameworks_heads():
    ranks = on_ranks(2, train_all, timeout=300)
    for rank in ranks:
        if isinstance(rank, Exception):
            raise rank
        for name in MODEL_CONFIGS:
            (plain_log, plain_weights), (log, weights) = rank[name, False], rank[name, True]
            terms = {
                name: log.pop(name) for name in list(log) if 'combined_' in name.replace('loss_combined', '')
            }
            assert {name.split('.')[-1] for name in terms} == {'combined_ce', 'combined_dice'}
            assert list(log) == list(plain_log)
            assert log == pytest.approx(plain_log, rel=1e-5)
            for key, value in plain_weights.items():
                np.testing.assert_allclose(weights[key], value, rtol=1e-5, atol=1e-5, err_msg=key)
    for name in MODEL_CONFIGS:
        (log, weights), (other_log, other_weights) = (rank[name, True] for rank in ranks)
        assert log['decode.acc_seg'] != other_log['decode.acc_seg']  # of images of its own
        for key, value in weights.items():
            if 'running' not in key:  # each rank's own with plain BN
                np.testing.assert_array_equal(value, other_weights[key], err_msg=key)
