import json
import logging
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from conftest import recoloured
from mmengine.hooks import Hook
from mmengine.logging import MessageHub
from mmengine.registry import HOOKS, MODEL_WRAPPERS
from mmengine.runner import Runner
from PIL import Image
from ranks import on_ranks, runner_on_rank
from scripted import log_of
from test_subclass_state import LateHead
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from mmseg_imbalance.class_weight import WeightRecord
from mmseg_imbalance.counting import count_classes
from mmseg_imbalance.datasets import CamVidDataset
from mmseg_imbalance.hooks import ClassWeightHook, SubclassVisualizationHook
from mmseg_imbalance.losses import WeightedLoss
from mmseg_imbalance.plots import draw_subclasses
from mmseg_imbalance.subclass import SimilaritySubclassifiedLoss, SubclassifiedLoss
from mmseg_imbalance.subclass_maps import find_subclassified, sharding_of, subclass_maps, subclasses
from mmseg_imbalance.weighting import class_weights, log_prior, scheduled_weights

BALANCED = 'segformer/segformer_mit-b0-small-combined_1xb8-2k_camvid-240x180'
TWO_HEADS = 'deeplabv3/deeplabv3_r18-d8-small-combined_1xb8-2k_camvid-240x180'


def filled(runner):
    """Weights of every loss of ours in the model, by name."""
    return {
        name: module.class_weight.values.tolist()
        for name, module in runner.model.named_modules()
        if getattr(module, 'class_weight', None) is not None
    }


def test_every_auto_loss_of_both_heads_gets_the_counted_weights(small_config):
    runner = Runner.from_cfg(small_config(TWO_HEADS))
    runner.train()
    expected = class_weights(count_classes(runner.train_dataloader.dataset)).tolist()
    assert filled(runner) == {
        'decode_head.loss_decode': pytest.approx(expected),
        'auxiliary_head.loss_decode': pytest.approx(expected),
    }
    record = json.loads(Path(runner.work_dir, 'class_weights.json').read_text())
    assert record['classes'][:2] == ['sky', 'building']
    assert record['weights'] == pytest.approx(expected)
    assert Image.open(Path(runner.work_dir, 'class_weights.png')).size[0] > 500
    text = log_of(runner)
    for word in ('class', 'pixels', 'share', 'images', 'sqrt_inv_freq', 'bicyclist'):
        assert word in text


@pytest.mark.parametrize('weight', ['auto', None])
def test_the_weights_of_the_region_term_are_filled_and_scheduled_too(small_config, weight):
    schedule = [(0.0, 1.0), (0.5, 0.5)]
    cfg = small_config(BALANCED, custom_hooks=[dict(type='ClassWeightHook', power_schedule=schedule)])
    cfg.model.decode_head.loss_decode.update(class_weight=weight, region_class_weight='auto')
    runner = Runner.from_cfg(cfg)
    runner.train()
    loss = runner.model.decode_head.loss_decode
    counted = class_weights(count_classes(runner.train_dataloader.dataset))
    expected = scheduled_weights(counted, schedule, 0.5)
    np.testing.assert_allclose(loss.region_class_weight.values, expected, rtol=1e-6)
    if weight == 'auto':
        np.testing.assert_allclose(loss.class_weight.values, expected, rtol=1e-6)
    else:
        assert loss.class_weight.values is None
    assert 'region_class_weight of decode_head.loss_decode' in log_of(runner)
    assert 'nothing' not in log_of(runner)


@pytest.mark.parametrize('weight', ['auto', dict(car=3.0)])
def test_an_averaged_model_beside_it_trains(small_config, weight):
    # EMAHook copies the model before the weights are known, and pairs its buffers by position
    cfg = small_config(BALANCED, custom_hooks=[dict(type='ClassWeightHook'), dict(type='EMAHook')])
    cfg.model.decode_head.loss_decode.class_weight = weight
    runner = Runner.from_cfg(cfg)
    runner.train()
    assert runner.iter == 2
    if weight != 'auto':
        assert filled(runner)['decode_head.loss_decode'] == [1.0] * 8 + [3.0, 1.0, 1.0]


def test_losses_of_the_framework_are_left_alone_and_named(small_config, camvid, tmp_path):
    cfg = small_config(TWO_HEADS)
    cfg.model.auxiliary_head.loss_decode = dict(type='CrossEntropyLoss', class_weight=[1.0] * 11)
    # the framework's class weights fail on ignored pixels, so there are none in this run
    cfg.train_dataloader.dataset.data_root = recoloured(camvid, tmp_path / 'camvid', 11)
    runner = Runner.from_cfg(cfg)
    runner.train()
    assert runner.model.auxiliary_head.loss_decode.class_weight == [1.0] * 11
    assert 'leaves auxiliary_head.loss_decode alone' in log_of(runner)
    assert "type='WeightedCrossEntropyLoss', class_weight='auto'" in log_of(runner)


def test_without_an_auto_loss_it_says_that_there_is_nothing_to_do(small_config):
    plain = small_config(BALANCED.replace('-combined', ''), custom_hooks=[dict(type='ClassWeightHook')])
    runner = Runner.from_cfg(plain)
    runner.train()
    assert "nothing to do: no loss of this package says class_weight='auto'" in log_of(runner)
    assert not Path(runner.work_dir, 'class_weights.json').exists()


@pytest.mark.parametrize('weight', ['file', [1.0] * 11, dict(pole=2.0)])
def test_weights_that_are_given_are_something_to_do(small_config, tmp_path, weight):
    """It holds the labels that arrive against them."""
    cfg = small_config(BALANCED)
    if weight == 'file':
        weight = str(tmp_path / 'weights.json')
        WeightRecord(list(CamVidDataset.METAINFO['classes']), [1.0] * 11).save(weight)
    cfg.model.decode_head.loss_decode.class_weight = weight
    runner = Runner.from_cfg(cfg)
    runner.train()
    assert 'nothing to do' not in log_of(runner)


@pytest.mark.parametrize('option', ['logit_adjustment', 'logit_variation'])
def test_a_loss_that_needs_the_class_frequency_gets_it(small_config, option):
    cfg = small_config(BALANCED)
    # deep supervision: each head its own
    cfg.model.decode_head.loss_decode = dict(type='WeightedTverskyLoss', **{option: 0.5})
    runner = Runner.from_cfg(cfg)
    runner.train()
    loss = runner.model.decode_head.loss_decode
    expected = log_prior(count_classes(runner.train_dataloader.dataset).pixels)
    logits = torch.zeros(1, len(expected), 1, 1)
    np.testing.assert_allclose(loss.class_weight.logit_bias(logits, 1.0), expected, rtol=1e-6)
    assert loss.class_weight.for_logits(logits) is None
    assert not loss.class_weight.needs_pixels


def test_options_reach_the_scheme(small_config):
    hook = dict(type='ClassWeightHook', scheme='inverse_freq', power=0.5, max_ratio=2.0, max_images=3)
    runner = Runner.from_cfg(small_config(BALANCED, custom_hooks=[hook]))
    runner.train()
    frequency = count_classes(runner.train_dataloader.dataset, max_images=3)
    expected = class_weights(frequency, 'inverse_freq', power=0.5, max_ratio=2.0)
    assert filled(runner)['decode_head.loss_decode'] == pytest.approx(expected.tolist())
    assert 'a sample of 4' in log_of(runner)


@pytest.mark.parametrize(
    ('options', 'error', 'message'),
    [
        (dict(scheme='freq'), ValueError, r"scheme must be one of .*'sqrt_inv_freq'.*got 'freq'"),
        (dict(alpha=1.0), TypeError, r"no option \['alpha'\].*'beta'"),
        (dict(scheme='effective_num', beta=1.0), ValueError, r'beta=1.0, allowed is \[0, 1\)'),
        (dict(max_ratio=0.5), ValueError, 'max_ratio=0.5, allowed is 1 and more'),
        (dict(power='2'), ValueError, "power='2', allowed are finite numbers"),
        (dict(unit='pixels'), ValueError, "unit='pixels', allowed are 'image' and 'pixel'"),
        (dict(max_images=0), ValueError, 'max_images must be a whole number, at least 1, got 0'),
        (dict(max_images=0.5), ValueError, 'max_images must be a whole number, at least 1, got 0.5'),
        (dict(num_workers=-1), ValueError, 'num_workers must be a whole number, at least 0, got -1'),
    ],
)
def test_unknown_and_impossible_options_are_refused_when_the_hook_is_built(options, error, message):
    with pytest.raises(error, match=message):
        ClassWeightHook(**options)


def test_plain_and_prefixed_names_build_it():
    for name in ('ClassWeightHook', 'mmseg_imbalance.ClassWeightHook'):
        assert isinstance(HOOKS.build(dict(type=name)), ClassWeightHook)


@pytest.fixture
def resume(small_config, camvid, tmp_path, request):
    """(folder of labels, weights of a run of two iterations, function that resumes it for a third).

    The parameter is a label that has become road in the first run.
    """
    root = recoloured(camvid, tmp_path / 'camvid', getattr(request, 'param', None))
    first = small_config(BALANCED)
    first.train_dataloader.dataset.data_root = root
    first.default_hooks.checkpoint.interval = 2
    runner = Runner.from_cfg(first)
    runner.train()

    def resumed(name, hook=None, **loss):
        cfg = small_config(BALANCED, resume=True, experiment_name=f'{tmp_path.name}-{name}')
        cfg.train_cfg.max_iters = 3
        cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
        cfg.train_dataloader.dataset.data_root = root
        cfg.model.decode_head.loss_decode.update(loss)
        if hook:
            cfg.custom_hooks = [hook]
        runner = Runner.from_cfg(cfg)
        runner.train()
        assert runner.iter == 3
        return runner

    return tmp_path / 'camvid', filled(runner), resumed


def test_a_resumed_run_gets_the_weights_of_its_checkpoint(resume):
    _, before, resumed = resume
    same = resumed('same')
    assert filled(same) == before
    assert 'weights of the checkpoint' in log_of(same)
    changed = resumed('changed', dict(type='ClassWeightHook', scheme='median_freq'))
    expected = class_weights(count_classes(changed.train_dataloader.dataset), 'median_freq')
    assert filled(changed)['decode_head.loss_decode'] == pytest.approx(expected.tolist())


def test_weights_follow_their_schedule_and_a_resumed_run_goes_on_in_it(small_config):
    seen = []

    @HOOKS.register_module(force=True)
    class WeightsHook(Hook):
        priority = 'LOW'

        def before_train_iter(self, runner, batch_idx, data_batch=None):
            seen.append(filled(runner)['decode_head.loss_decode'])

    cfg = small_config(BALANCED)
    cfg.train_cfg.update(max_iters=4, val_interval=4)
    cfg.custom_hooks = [
        dict(type='ClassWeightHook', power_schedule=[(0.0, 1.0), (0.5, 0.0)]),
        dict(type='WeightsHook'),
    ]
    cfg.default_hooks.checkpoint.update(interval=1, max_keep_ckpts=-1)
    Runner.from_cfg(cfg).train()
    record = WeightRecord.load(Path(cfg.work_dir, 'class_weights.json'))
    assert seen[0] == pytest.approx(record.weights)
    assert np.ptp([weight for weight in seen[1] if weight]) < np.ptp([w for w in seen[0] if w])
    assert [weight for weight in seen[2] if weight] == pytest.approx([1.0] * np.count_nonzero(seen[2]))
    assert seen[3] == seen[2]
    (log,) = Path(cfg.work_dir).glob('*/vis_data/scalars.json')
    logged = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line['class_weight_power'] for line in logged if 'loss' in line] == [1.0, 0.5, 0.0, 0.0]

    cfg.load_from, cfg.resume = str(Path(cfg.work_dir, 'iter_1.pth')), True
    cfg.experiment_name = 'resumed'
    Runner.from_cfg(cfg).train()
    assert seen[4:] == [pytest.approx(weights) for weights in seen[1:4]]

    cfg.custom_hooks = [dict(type='ClassWeightHook')]
    cfg.experiment_name = cfg.visualizer.name = 'without'
    Runner.from_cfg(cfg).train()
    *_, log = sorted(
        Path(cfg.work_dir).glob('*/vis_data/scalars.json'), key=lambda path: path.stat().st_mtime
    )
    assert 'loss' in log.read_text()
    assert 'class_weight_power' not in log.read_text()


def test_a_schedule_without_auto_weights_is_warned_of(small_config):
    cfg = small_config(BALANCED)
    cfg.model.decode_head.loss_decode.class_weight = [1.0] * 11
    cfg.custom_hooks = [dict(type='ClassWeightHook', power_schedule=[(0.0, 1.0)])]
    runner = Runner.from_cfg(cfg)
    runner.train()
    assert 'power_schedule of ClassWeightHook changes nothing' in log_of(runner)


def test_a_run_resumed_on_mended_labels_gets_new_weights_and_says_how_to_keep_the_old(resume, camvid):
    folder, before, resumed = resume
    old = json.loads((folder.parent / 'work_dir' / 'class_weights.json').read_text())
    recoloured(camvid, folder, 10)
    runner = resumed('mended')
    after = filled(runner)
    assert after['decode_head.loss_decode'][10] == 0
    expected = class_weights(count_classes(runner.train_dataloader.dataset)).tolist()
    assert after['decode_head.loss_decode'] == pytest.approx(expected)
    log = log_of(runner)
    assert 'annotations are not those that the weights of the checkpoint' in log
    assert f'bicyclist: {old["pixels"][10]:,} pixels in {old["images"][10]} images, now 0 in 0' in log
    assert re.search(r'road: [\d,]+ pixels in', log)
    assert not re.search(r'sky: [\d,]+ pixels in', log)
    assert json.loads(Path(runner.work_dir, 'class_weights.json').read_text())['weights'][10] == 0

    kept = Path(runner.work_dir, 'class_weights_until_2.json')
    assert f'class_weight={str(kept)!r}' in log
    assert filled(resumed('kept', class_weight=str(kept))) == before


@pytest.mark.parametrize('resume', [10], indirect=True)
def test_old_weights_are_not_recommended_where_one_is_0_for_a_class_that_now_has_labels(resume, camvid):
    folder, before, resumed = resume
    assert before['decode_head.loss_decode'][10] == 0
    recoloured(camvid, folder)
    runner = resumed('mended')
    assert filled(runner)['decode_head.loss_decode'][10] > 0
    log = log_of(runner)
    assert 'annotations are not those that the weights of the checkpoint' in log
    assert "The old weights, which are 0 for ['bicyclist'], cannot be kept" in log
    assert 'class_weights_until_2.json' not in log


def test_a_run_resumed_where_the_annotations_are_gone_keeps_its_weights(resume, monkeypatch):
    _, before, resumed = resume

    def gone(*_, **__):
        raise FileNotFoundError('3.png: no such annotation file')

    monkeypatch.setattr('mmseg_imbalance.hooks.training_frequency', gone)
    runner = resumed('gone')
    assert filled(runner) == before
    assert 'whose weights stay: 3.png: no such annotation file' in log_of(runner)
    with pytest.raises(FileNotFoundError, match='no such annotation'):
        resumed('other', dict(type='ClassWeightHook', scheme='median_freq'))


def test_the_log_says_which_data_set_brings_which_class(small_config, camvid, tmp_path):
    cfg = small_config(BALANCED)
    data = cfg.train_dataloader.dataset
    other = data.copy()
    other.data_root = recoloured(camvid, tmp_path / 'other', 10)
    cfg.train_dataloader.dataset = dict(type='ConcatDataset', datasets=[data, other])
    runner = Runner.from_cfg(cfg)
    runner.train()
    table = log_of(runner).partition('pixels of each class in 2 data sets')[2]
    assert str(tmp_path / 'other') in table
    row = next(line for line in table.splitlines() if 'bicyclist' in line)
    assert [cell.strip() for cell in row.split('│')[1:-1]][2] == '-'


def test_masks_of_0_and_255_end_the_run_before_it_trains(small_config, camvid, tmp_path):
    root = recoloured(camvid, tmp_path / 'masks')
    for path in (tmp_path / 'masks').glob('annotations/*/*.png'):
        mask = np.where(np.array(Image.open(path)) == 3, 255, 0)
        Image.fromarray(mask.astype(np.uint8)).save(path)
    cfg = small_config(BALANCED)
    names = dict(classes=('background', 'road'), palette=[[0, 0, 0], [9, 9, 9]])
    cfg.train_dataloader.dataset.update(type='BaseSegDataset', data_root=root, metainfo=names)
    with pytest.raises(ValueError, match=r"only the class 'background' of 2 .* Masks of 0 and 255"):
        Runner.from_cfg(cfg).train()


def test_an_absent_class_is_named_once_in_the_log(small_config, camvid, tmp_path):
    cfg = small_config(BALANCED)
    cfg.train_dataloader.dataset.data_root = recoloured(camvid, tmp_path / 'camvid', 10)
    runner = Runner.from_cfg(cfg)
    runner.train()
    assert log_of(runner).count('bicyclist') >= 2
    assert log_of(runner).count('never occur') == 1


def test_a_head_that_ignores_another_label_is_counted_so(small_config):
    # without the label map of CamVidDataset, 11 is in the labels and only the head says what it means
    cfg = small_config(BALANCED)
    classes = tuple(f'c{i}' for i in range(11))
    cfg.train_dataloader.dataset.update(type='BaseSegDataset', metainfo=dict(classes=classes))
    cfg.model.decode_head.ignore_index = 11
    cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    runner = Runner.from_cfg(cfg)
    runner.train()
    assert len(filled(runner)['decode_head.loss_decode']) == 11


def train_on_ranks(cfg_text, root):
    if root:
        Path(root, 'annotations', 'train', '1.png').write_bytes(b'no image')
    dist.barrier()
    runner = runner_on_rank(cfg_text)
    runner.train()
    losses = {n: m for n, m in runner.model.named_modules() if isinstance(m, WeightedLoss)}
    weights = {n: loss.class_weight.values.tolist() for n, loss in losses.items()}
    return weights, next(runner.model.parameters()).sum().item()


def test_two_ranks_train_with_the_same_weights_and_an_error_of_one_ends_both(small_config, camvid, tmp_path):
    alone = Runner.from_cfg(small_config(BALANCED))
    alone.train()
    cfg = small_config(BALANCED, experiment_name=f'{tmp_path.name}-ranks')
    (weights, parameter), (other_weights, other_parameter) = on_ranks(
        2, train_on_ranks, cfg.pretty_text, None
    )
    assert weights == other_weights
    assert weights['module.decode_head.loss_decode'] == filled(alone)['decode_head.loss_decode']
    assert parameter == other_parameter

    root = recoloured(camvid, tmp_path / 'camvid')
    cfg.train_dataloader.dataset.data_root = root
    errors = on_ranks(2, train_on_ranks, cfg.pretty_text, root)
    assert all(isinstance(error, ValueError) for error in errors), errors
    assert str(errors[0]) == str(errors[1])
    assert '1.png' in str(errors[0])


def subclassified(small_config, type='SubclassifiedLoss', hook=True, **options):
    """A config in which the head has a subclassified loss beside the combined one."""
    cfg = small_config(BALANCED, **options)
    own = dict(num_subclasses=2, warmup_iters=0, ramp_iters=0) if type == 'SubclassifiedLoss' else {}
    loss = dict(type=type, class_weight='auto', **own)
    cfg.model.decode_head.loss_decode = [cfg.model.decode_head.loss_decode, loss]
    if hook:
        cfg.custom_hooks = [*cfg.custom_hooks, dict(type='SubclassVisualizationHook')]
    return cfg


def pictures(runner):
    return {path.name: path for path in Path(runner.log_dir, 'vis_data', 'vis_image').glob('*.png')}


@pytest.mark.parametrize('type', ['SubclassifiedLoss', 'SimilaritySubclassifiedLoss'])
def test_validation_draws_images_and_logs_a_table_of_subclasses(small_config, type):
    runner = Runner.from_cfg(subclassified(small_config, type))
    runner.train()
    files = pictures(runner)
    assert sorted(files) == [f'decode_head.1_subclass_{i}_2.png' for i in range(2)]

    # the model is still as it was at validation
    model = runner.model.eval()
    dataset = runner.val_dataloader.dataset
    batch = runner.val_dataloader.collate_fn([dataset[1]])
    maps = subclass_maps(model, find_subclassified(model), batch, 0)['decode_head.1']
    state = subclasses(model.decode_head.loss_decode[1])
    assert (state is None) == (maps.subclass is None) == (type == 'SimilaritySubclassifiedLoss')
    palette = np.array(dataset.metainfo['palette'])
    expected = draw_subclasses(maps, dataset.metainfo['classes'], palette, state)
    written = np.array(Image.open(files['decode_head.1_subclass_1_2.png']))
    np.testing.assert_array_equal(written, expected)

    log = log_of(runner)
    tables = log.count('subclasses of decode_head.1, 2 iterations')
    assert tables == (type == 'SubclassifiedLoss')
    if tables:
        table = log.partition('subclasses of decode_head.1')[2]
        assert 'mean loss' in table
        for name, weights in zip(dataset.metainfo['classes'], state.weight, strict=True):
            assert name in table
            assert all(f' {w:.3f} ' in table for w in weights[np.isfinite(weights)])


def test_training_goes_on_as_if_there_had_been_no_pictures(small_config, tmp_path):
    def trained(hook):
        name = f'{tmp_path.name}-{hook}'
        cfg = subclassified(small_config, hook=hook, experiment_name=name)
        cfg.visualizer.name = name
        cfg.train_cfg.update(max_iters=3, val_interval=1)
        runner = Runner.from_cfg(cfg)
        runner.train()
        assert len(pictures(runner)) == (6 if hook else 0)
        return runner.model.state_dict(), torch.get_rng_state()

    (without, random), (beside, same) = trained(False), trained(True)
    assert torch.equal(random, same)
    assert without.keys() == beside.keys()
    assert any('weighting.pixels' in name for name in without)
    for name, value in without.items():
        assert torch.equal(value, beside[name]), name


def test_so_many_images_are_drawn_and_an_averaged_model_is_drawn_in_half_precision(small_config):
    cfg = subclassified(small_config)
    cfg.custom_hooks[-1].num_images = 1
    cfg.custom_hooks.append(dict(type='EMAHook'))
    cfg.val_cfg.fp16 = True
    cfg.val_dataloader.batch_size = 2
    runner = Runner.from_cfg(cfg)
    loss = runner.model.decode_head.loss_decode[1]
    seen = []
    weigh = loss.weigh_pixels
    loss.weigh_pixels = lambda batch: (seen.append((batch.logits.dtype, loss.training)), weigh(batch))[1]
    runner.train()
    assert list(pictures(runner)) == ['decode_head.1_subclass_0_2.png']
    # of two iterations and of one image
    assert [training for _, training in seen] == [True, True, False]
    assert seen[0][0] == torch.float32
    assert seen[2][0] in (torch.float16, torch.bfloat16)


def test_without_a_subclassified_loss_there_is_one_warning(small_config):
    cfg = small_config(BALANCED)
    cfg.custom_hooks.append(dict(type='SubclassVisualizationHook'))
    cfg.train_cfg.val_interval = 1
    runner = Runner.from_cfg(cfg)
    runner.train()
    assert runner.iter == 2
    assert log_of(runner).count('SubclassVisualizationHook has nothing to show: no head of') == 1
    assert not pictures(runner)


def test_subclasses_by_class_name_are_shown_without_training(small_config):
    cfg = small_config('segformer/segformer_mit-b0-small-subclass3_1xb8-2k_camvid-240x180')
    cfg.model.decode_head.loss_decode[1].num_subclasses = dict(car=2)
    runner = Runner.from_cfg(cfg)
    runner.val()
    assert 'subclasses of decode_head.1, 0 iterations' in log_of(runner)


def test_a_head_whose_channels_are_not_known_yet_is_shown_without_training(small_config):
    cfg = subclassified(small_config)
    cfg.model.decode_head.update(type='FeatureHead', base=LateHead, init_cfg=None)
    runner = Runner.from_cfg(cfg)
    assert subclasses(runner.model.decode_head.loss_decode[1]) is None
    runner.val()
    assert 'subclasses of' not in log_of(runner)
    assert len(pictures(runner)) == 2


def test_a_number_of_images_below_0_is_refused():
    with pytest.raises(ValueError, match='num_images must be a whole number, at least 0, got -1'):
        SubclassVisualizationHook(-1)


def test_weights_that_are_divided_by_the_pixels_are_drawn_as_multiples_of_their_mean(small_config):
    cfg = subclassified(small_config, 'SimilaritySubclassifiedLoss')
    cfg.model.decode_head.loss_decode[1].paper_exact = True
    runner = Runner.from_cfg(cfg)
    runner.train()
    model = runner.model.eval()
    batch = runner.val_dataloader.collate_fn([runner.val_dataloader.dataset[1]])
    maps = subclass_maps(model, find_subclassified(model), batch, 0)['decode_head.1']
    assert maps.weight.mean() == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize('padded', [False, True])
def test_maps_are_those_of_the_whole_image_at_the_size_of_its_truth(small_config, padded):
    cfg = subclassified(small_config)
    if padded:
        cfg.model.data_preprocessor.test_cfg = dict(size_divisor=64)
    runner = Runner.from_cfg(cfg)
    runner.train()
    model = runner.model.eval()
    dataset = runner.val_dataloader.dataset
    sample = dataset[1]
    assert sample['inputs'].shape != (3, 72, 96)
    batch = runner.val_dataloader.collate_fn([dataset[0], sample])
    maps = subclass_maps(model, find_subclassified(model), batch, 1)['decode_head.1']
    assert maps.image.shape == (72, 96, 3)
    # BGR in, RGB out
    mean = sample['inputs'].float().mean((1, 2)).numpy()
    np.testing.assert_allclose(maps.image.mean((0, 1)), mean[::-1], atol=1)

    label = sample['data_samples'].gt_sem_seg.data[0].numpy()
    assert (label == 255).any()
    np.testing.assert_array_equal(maps.truth, np.where(label == 255, -1, label))
    counted = maps.truth >= 0
    state = subclasses(model.decode_head.loss_decode[1])
    assert len(np.unique(maps.subclass[counted])) == 2
    expected = state.weight[maps.truth, maps.subclass][counted]
    np.testing.assert_allclose(maps.weight[counted], expected, rtol=1e-6)

    # the nearest centroid of the class, from features made here
    head, clustering = model.decode_head, model.decode_head.loss_decode[1].weighting
    pre = model.data_preprocessor
    with torch.no_grad():
        image = ((sample['inputs'].flip(0).float() - pre.mean) / pre.std)[None]
        features = head.forward_with_features(model.extract_feat(image))[1][0]  # (D, h, w)
    assert head.features is None
    height, width = features.shape[1:]
    rows, columns = np.arange(72) * height // 72, np.arange(96) * width // 96
    at_pixel = features[:, rows][:, :, columns].permute(1, 2, 0).double()[torch.from_numpy(counted)]
    centroids = clustering.centroid.double()[maps.truth[counted]]  # (n, K, D)
    distance = (centroids - at_pixel[:, None]).square().sum(2)
    distance[torch.from_numpy(~np.isfinite(state.weight[maps.truth[counted]]))] = torch.inf
    same = distance.argmin(1).numpy() == maps.subclass[counted]
    assert same.mean() > 0.999


def test_losses_of_auxiliary_heads_are_found_and_of_cascades_those_of_the_first_stage(small_config):
    cfg = small_config(TWO_HEADS)
    cfg.model.auxiliary_head.loss_decode = dict(type='SimilaritySubclassifiedLoss')
    cfg.custom_hooks.append(dict(type='SubclassVisualizationHook', num_images=1))
    runner = Runner.from_cfg(cfg)
    runner.train()
    assert list(pictures(runner)) == ['auxiliary_head_subclass_0_2.png']

    def stage(*losses):
        head = nn.Module()
        head.loss_decode = nn.ModuleList(losses)
        return head

    model = nn.Module()
    subclass = SimilaritySubclassifiedLoss()
    model.decode_head = nn.ModuleList([stage(nn.Identity(), subclass), stage(SubclassifiedLoss())])
    found = find_subclassified(model)
    assert list(found) == ['decode_head.0.1']
    assert found['decode_head.0.1'] == (model.decode_head[0], subclass)
    model.decode_head[0] = stage()
    with pytest.raises(ValueError, match=r'decode_head\.1\.loss_decode\.0: later stages of a cascade'):
        find_subclassified(model)


def test_two_ranks_draw_once_and_do_not_hang(small_config, tmp_path):
    cfg = subclassified(small_config, experiment_name=f'{tmp_path.name}-ranks')
    (weights, parameter), (other_weights, other_parameter) = on_ranks(
        2, train_on_ranks, cfg.pretty_text, None
    )
    assert weights == other_weights
    assert parameter == other_parameter
    # each rank validates one of the two images, and the main one shows its own
    names = [path.name for path in Path(cfg.work_dir).rglob('vis_image/*.png')]
    assert names == ['decode_head.1_subclass_0_2.png']


def communicating_on_ranks(cfg_text):
    """Train on ranks where each forward of the backbone waits for the other ranks, as SyncBN may."""
    runner = runner_on_rank(cfg_text)
    calls = []

    def meet(module, args, out):
        calls.append(1)
        dist.all_reduce(torch.zeros(1))

    runner.model.module.backbone.register_forward_hook(meet)
    runner.train()
    return len(calls), log_of(runner) if dist.get_rank() == 0 else ''


@pytest.mark.parametrize(
    ('batch_size', 'num_images', 'forwards'), [(1, 4, 4), (2, 4, 3), (2, 1, 2), (2, 0, 1)]
)
def test_ranks_that_meet_in_each_forward_do_not_hang(
    small_config, tmp_path, batch_size, num_images, forwards
):
    cfg = subclassified(small_config, experiment_name=f'{tmp_path.name}-ranks')
    cfg.custom_hooks[-1].num_images = num_images
    cfg.val_dataloader.update(batch_size=batch_size)
    # three images on two ranks: with two in a batch, the batches of the ranks are not of one size
    cfg.val_dataloader.dataset.update(data_prefix=cfg.train_dataloader.dataset.data_prefix, indices=3)
    cfg.val_dataloader.sampler.round_up = batch_size == 1
    (calls, _), (other_calls, _) = on_ranks(2, communicating_on_ranks, cfg.pretty_text, timeout=60)
    assert calls == other_calls == 2 + forwards
    names = sorted(path.name for path in Path(cfg.work_dir).rglob('vis_image/*.png'))
    assert names == [f'decode_head.1_subclass_{i}_2.png' for i in (0, 2)[:num_images]]


class Shards(nn.Module):
    """A wrapper that is not of the kind that leaves each rank all parameters, as those of DeepSpeed."""

    def __init__(self, module):
        super().__init__()
        self.module = module


def test_a_sharded_model_is_left_alone_with_one_warning(monkeypatch, caplog):
    model = nn.Module()
    model.decode_head = nn.Module()
    model.decode_head.loss_decode = SimilaritySubclassifiedLoss()
    assert sharding_of(model) is None
    assert sharding_of(nn.DataParallel(model)) is None
    monkeypatch.setitem(MODEL_WRAPPERS.module_dict, 'Shards', Shards)
    inner = nn.Module()
    inner.decode_head = FullyShardedDataParallel.__new__(FullyShardedDataParallel)  # it asks for a GPU
    nn.Module.__init__(inner.decode_head)
    assert sharding_of(inner) == 'FullyShardedDataParallel'
    runner = SimpleNamespace(model=Shards(model), logger=logging.getLogger('sharded'))
    hook = SubclassVisualizationHook()
    for step in (hook.before_run, hook.before_val_epoch):
        step(runner)
    hook.after_val_iter(runner, 0, dict(inputs=[None]))
    assert [record.levelname for record in caplog.records] == ['WARNING']
    assert 'shows nothing: with Shards each rank holds a part of the parameters' in caplog.text


def distributed_tensor_on_ranks():
    try:
        from torch.distributed.tensor import DeviceMesh, Shard, distribute_tensor
    except ImportError:  # PyTorch before 2.5
        from torch.distributed._tensor import DeviceMesh, Shard, distribute_tensor
    model = nn.Sequential(nn.Conv2d(2, 2, 1), nn.Conv2d(2, 2, 1))
    weight = distribute_tensor(model[1].weight, DeviceMesh('cpu', [0, 1]), [Shard(0)])
    model[1].weight = nn.Parameter(weight)
    return sharding_of(model)


@pytest.mark.slow
def test_distributed_tensors_are_sharded():
    assert on_ranks(2, distributed_tensor_on_ranks) == ['DTensor'] * 2


@pytest.mark.parametrize(
    ('change', 'same'),
    [
        ({}, True),
        (dict(options=dict(power=0.5)), False),
        (dict(max_images=7), False),
        (dict(scheme='median_freq'), False),
        (dict(classes=['b', 'a']), False),
    ],
)
def test_a_resumed_run_takes_old_weights_with_the_same_options_alone(change, same):
    made = dict(classes=['a', 'b'], weights=[0.5, 1.5], scheme='sqrt_inv_freq', options={}, max_images=None)
    hub = MessageHub.get_instance('resumed')
    hub.update_info('class_weights', WeightRecord(**made | change).to_dict())
    dataset = SimpleNamespace(metainfo=dict(classes=('a', 'b')))
    runner = SimpleNamespace(message_hub=hub, train_dataloader=SimpleNamespace(dataset=dataset))
    assert (ClassWeightHook()._of_checkpoint(runner) is not None) == same
