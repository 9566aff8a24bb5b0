import numpy as np
import pytest
import torch.distributed as dist
from mmengine.dataset import DefaultSampler
from mmengine.logging import MessageHub, MMLogger
from mmengine.registry import METRICS, init_default_scope
from ranks import on_ranks
from test_metrics import CLASSES, GROUPS, SMALL, same, samples, scenes_of

import mmseg_imbalance  # noqa: F401
from mmseg_imbalance.datasets import CamVidDataset
from mmseg_imbalance.scores import load_image_scores

pytestmark = pytest.mark.slow

IMAGES = 5  # the share of the second of two ranks is filled up with an image of the first


def evaluate(folder, classes, cfg, groups):
    """Metrics of this rank's share of the images, as a loader of MMEngine deals them."""
    folder.mkdir(parents=True, exist_ok=True)
    init_default_scope('mmseg')
    logger = MMLogger.get_instance(str(folder), log_file=str(folder / 'run.log'))
    MessageHub.get_instance(str(folder)).update_info('cfg', cfg)
    labels, predictions = scenes_of(IMAGES)
    options = dict(groups=groups, object_areas=(7, 30), iou_metrics=['mIoU', 'mDice', 'mHD95'])
    metric = METRICS.build(dict(type='ImbalanceIoUMetric', **options))
    metric.collect_dir = str(folder / 'collected')  # MMEngine's own would be in the working directory
    metric.dataset_meta = dict(classes=classes)
    indices = list(DefaultSampler(labels, shuffle=False))
    for batch in (indices[:2], indices[2:]):
        names = [f'{i * 7 % 10}.png' for i in batch]  # the images are not in the order of their names
        metric.process({}, samples(labels[batch], predictions[batch], names))
    metrics = metric.evaluate(IMAGES)
    for handler in logger.handlers:
        handler.flush()
    return metrics


def evaluate_each(folder, good, lost):
    """Metrics with named groups, with thirds, and with training data that only the other rank can see."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    camvid = CamVidDataset.METAINFO['classes']
    return dict(
        named=evaluate(folder / 'named', CLASSES, '', GROUPS),
        thirds=evaluate(folder / 'thirds', camvid, good, 'thirds'),
        lost_0=evaluate(folder / 'lost_0', camvid, lost if rank == 0 else good, 'thirds'),
        lost_1=evaluate(folder / 'lost_1', camvid, lost if rank == 1 else good, 'thirds'),
    )


def test_two_ranks_give_exactly_what_one_process_gives(small_config, tmp_path):
    good = small_config(SMALL).pretty_text
    lost = small_config(SMALL, **{'train_dataloader.dataset.data_root': '/nowhere'}).pretty_text
    ranks = on_ranks(2, evaluate_each, tmp_path / 'two', good, lost, timeout=300)
    if failed := [rank for rank in ranks if isinstance(rank, Exception)]:
        raise failed[0]
    alone = evaluate_each(tmp_path / 'one', good, lost)
    for case in ('named', 'thirds'):
        for rank in ranks:
            same(rank[case], alone[case])
        assert alone[case]['mHD95'] > 0
        assert 'mIoU.tail.low' in alone[case] or case == 'thirds'  # the images lack the tail of CamVid
        first, second = (load_image_scores(tmp_path / n / case / 'image_scores.npz') for n in ('one', 'two'))
        assert all(np.array_equal(first[key], second[key]) for key in first)
        assert set(second['group']) == {'head', 'body', 'tail'}
    # if one rank cannot count, none does and none waits; the other numbers are there
    for case in ('lost_0', 'lost_1'):
        same(ranks[0][case], ranks[1][case])
        groups = {key for key in alone['thirds'] if key.split('.')[1:2] in (['head'], ['body'], ['tail'])}
        assert groups
        same(ranks[0][case], {k: v for k, v in alone['thirds'].items() if k not in groups})
        log = (tmp_path / 'two' / case / 'run.log').read_text()
        assert '/nowhere' in log
        assert log.count('ImbalanceIoUMetric cannot') == 1
