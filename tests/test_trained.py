"""Trained models: what their logits say of the probabilities; fit-bias from checkpoint to checkpoint."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmseg.registry import MODELS
from torch import nn

from mmseg_imbalance.class_bias import expected_iou, fit_class_bias
from mmseg_imbalance.class_weight import WeightRecord
from mmseg_imbalance.commands import main
from mmseg_imbalance.trained import (
    belief_offset,
    classifying_head,
    load_segmentor,
    sampled_logits,
    split_with_test_pipeline,
)

WEIGHTS = [0.25, 1.0, 4.0]
PIXELS = [900, 90, 10]
AUTO = dict(class_weight='auto')


def checkpoint_of(weights=WEIGHTS, pixels=PIXELS):
    record = WeightRecord(['a', 'b', 'c'], weights, pixels)
    # of the last of 1000 iterations
    return dict(message_hub=dict(runtime_info=dict(class_weights=record.to_dict(), iter=999, max_iters=1000)))


def head_with(*losses):
    built = [MODELS.build(loss) for loss in losses]
    return SimpleNamespace(num_classes=3, loss_decode=built[0] if len(built) == 1 else nn.ModuleList(built))


def offset_of(*losses, checkpoint=None, **config):
    return belief_offset(
        Config(config), head_with(*losses), checkpoint_of() if checkpoint is None else checkpoint
    )


def test_weights_of_the_published_form_of_similarity_are_taken_back():
    loss = dict(type='SimilaritySubclassifiedLoss', paper_exact=True, class_weight=WEIGHTS)
    np.testing.assert_allclose(offset_of(loss), -np.log(WEIGHTS))


@pytest.mark.parametrize(
    ('options', 'offset'),
    [
        (dict(), np.zeros(3)),
        (dict(class_weight=WEIGHTS), -np.log(WEIGHTS)),
        (AUTO, -np.log(WEIGHTS)),
        (dict(logit_adjustment=0.5), 0.5 * np.log(np.array(PIXELS) / 1000)),
        (dict(logit_adjustment=1.0, **AUTO), np.log(np.array(PIXELS) / 1000) - np.log(WEIGHTS)),
    ],
)
def test_the_lowest_loss_is_where_logits_and_offset_are_the_probabilities(options, offset):
    loss = dict(type='WeightedCrossEntropyLoss', **options)
    np.testing.assert_allclose(offset_of(loss), offset, atol=1e-12)
    # two kinds of pixels that a model tells apart, with their own share of each class
    counts = torch.tensor([[600, 30, 1], [300, 60, 9]])
    target = torch.cat([torch.arange(3).repeat_interleave(count) for count in counts])[None, None]
    module = MODELS.build(loss).double()
    if module.class_weight.auto:
        module.class_weight.set_weights(WEIGHTS)
    if module.class_weight.needs_pixels:
        module.class_weight.set_pixels(PIXELS)
    logits = torch.zeros(2, 3, dtype=torch.double, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], max_iter=300, tolerance_grad=1e-12, line_search_fn='strong_wolfe')

    def value():
        optimizer.zero_grad()
        result = module(logits.repeat_interleave(counts.sum(1), 0).T[None, :, None], target)
        result.backward()
        return result

    optimizer.step(value)
    believed = (logits.detach() + torch.from_numpy(offset)).softmax(1)
    torch.testing.assert_close(believed, counts / counts.sum(1, keepdim=True).double(), rtol=1e-3, atol=1e-5)


def test_the_weights_are_those_of_cross_entropy_at_the_end():
    combined = dict(type='CombinedWeightedLoss', **AUTO)
    np.testing.assert_allclose(offset_of(combined), -np.log(WEIGHTS))
    fading = dict(type='ClassWeightHook', power_schedule=[(0.25, 1.0), (0.75, 0.0)])
    assert (offset_of(combined, custom_hooks=[fading]) == 0).all()
    deferred = dict(type='ClassWeightHook', power_schedule=[(0.8, 0.0), (0.8, 1.0)])
    late = offset_of(combined, custom_hooks=[deferred])
    np.testing.assert_allclose(late - late[0], -np.log(WEIGHTS) + np.log(WEIGHTS[0]))
    # a region loss is left as it is, wherever it stands; a class of weight 0 too
    dice, own = dict(type='WeightedDiceLoss', **AUTO), dict(type='CrossEntropyLoss', class_weight=WEIGHTS)
    assert (offset_of(dice) == 0).all()
    for region in (dice, dict(type='DiceLoss'), dict(type='TverskyLoss', class_weight=[1.0, 2.0, 3.0])):
        np.testing.assert_allclose(offset_of(region, own), -np.log(WEIGHTS))
    # the weights of the region term are others
    other = dict(type='CombinedWeightedLoss', class_weight=WEIGHTS, region_class_weight='auto')
    np.testing.assert_allclose(offset_of(other), -np.log(WEIGHTS))
    assert (offset_of(dict(type='CombinedWeightedLoss', region_class_weight='auto')) == 0).all()
    # recall weighs anew in each batch
    assert (offset_of(dict(type='RecallWeightedLoss', **AUTO)) == 0).all()
    zero = dict(type='WeightedCrossEntropyLoss', class_weight=[0.0, 1.0, 2.0])
    np.testing.assert_allclose(offset_of(zero), [0, 0, -np.log(2)])


def test_a_cross_entropy_that_does_not_count_has_no_weights_to_take_back():
    plain = dict(type='WeightedCrossEntropyLoss')
    weighted = dict(type='WeightedCrossEntropyLoss', class_weight=WEIGHTS)
    assert (offset_of(dict(type='CombinedWeightedLoss', ce_weight=0.0, **AUTO)) == 0).all()
    assert (offset_of(dict(weighted, loss_weight=0.0), plain) == 0).all()
    own = dict(type='CrossEntropyLoss', class_weight=WEIGHTS, loss_weight=0.0)
    np.testing.assert_allclose(offset_of(own, weighted), -np.log(WEIGHTS))


def test_cross_entropies_of_different_weights_are_refused_and_of_equal_ones_taken():
    weighted = dict(type='WeightedCrossEntropyLoss', class_weight=WEIGHTS)
    np.testing.assert_allclose(
        offset_of(weighted, dict(type='CombinedWeightedLoss', **AUTO)), -np.log(WEIGHTS)
    )
    doubled = dict(weighted, class_weight=[2 * w for w in WEIGHTS])  # the mean divides by them
    np.testing.assert_allclose(offset_of(weighted, doubled), -np.log(WEIGHTS))
    zeros = [dict(weighted, class_weight=[0.0, factor, 2 * factor]) for factor in (2.0, 3.0)]
    np.testing.assert_allclose(offset_of(*zeros), [0, -np.log(2), -np.log(4)])
    for one, other in (([1.0, 1.0, 4.0], [1.0, 1.0, 8.0]), ([0.0, 1.0, 2.0], [1.0, 1.0, 2.0])):
        with pytest.raises(ValueError, match='have different class weights'):
            offset_of(dict(weighted, class_weight=one), dict(weighted, class_weight=other))
    with pytest.raises(ValueError, match='have different class weights or logit adjustments'):
        offset_of(dict(type='WeightedCrossEntropyLoss', loss_weight=0.2), dict(weighted, loss_weight=0.8))


def test_the_weights_of_a_checkpoint_on_the_way_are_those_of_its_last_iteration():
    combined = dict(type='CombinedWeightedLoss', **AUTO)
    hooks = [dict(type='ClassWeightHook', power_schedule=[(0.25, 1.0), (0.75, 0.0)])]
    for iteration, power in ((0, 1.0), (200, 1.0), (500, 0.5), (599, 0.302), (999, 0.0)):
        checkpoint = checkpoint_of()
        checkpoint['message_hub']['runtime_info'].update(iter=iteration, max_iters=1000)
        offset = offset_of(combined, checkpoint=checkpoint, custom_hooks=hooks)
        ratio = np.array(WEIGHTS) / WEIGHTS[0]
        np.testing.assert_allclose(offset - offset[0], -power * np.log(ratio), atol=1e-12)
    del checkpoint['message_hub']['runtime_info']['max_iters']
    with pytest.raises(ValueError, match='does not say how far its training was'):
        offset_of(combined, checkpoint=checkpoint, custom_hooks=hooks)


def test_a_checkpoint_that_does_not_say_its_weights_is_refused():
    with pytest.raises(ValueError, match='does not say which class weights'):
        offset_of(dict(type='CombinedWeightedLoss', **AUTO), checkpoint=dict(state_dict={}))


BALANCED = 'segformer/segformer_mit-b0-small-combined_1xb8-2k_camvid-240x180'


@pytest.fixture
def trained(small_config, tmp_path):
    """A config file and a checkpoint as a training writes it, of a model that sees road almost everywhere."""
    cfg = small_config(BALANCED)
    config, checkpoint = tmp_path / 'config.py', tmp_path / 'iter_2.pth'
    cfg.dump(config)
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    nn.init.normal_(model.decode_head.conv_seg.weight, std=0.3)
    with torch.no_grad():
        model.decode_head.conv_seg.bias[3] += 3
    record = WeightRecord([f'{c}' for c in range(11)], [0.5] * 10 + [2.0], [10] * 11)
    hub = dict(runtime_info=dict(class_weights=record.to_dict()))
    content = dict(state_dict=model.state_dict(), message_hub=hub, optimizer=dict(), meta=dict(iter=2))
    torch.save(content, checkpoint)
    return config, checkpoint, cfg


def load(path):
    return torch.load(path, weights_only=False)


def test_fit_bias_changes_the_bias_of_the_classifier_alone(trained, capsys):
    config, checkpoint, cfg = trained
    before = checkpoint.read_bytes()
    assert main(['fit-bias', str(config), str(checkpoint)]) == 0
    out = checkpoint.with_name('bias_iter_2.pth')
    printed = capsys.readouterr().out
    assert f'{out}: fitted to 4 images of train' in printed
    assert 'bicyclist' in printed
    assert checkpoint.read_bytes() == before
    old, new = load(checkpoint), load(out)
    changed = [name for name, x in old['state_dict'].items() if not torch.equal(x, new['state_dict'][name])]
    assert changed == ['decode_head.conv_seg.bias']
    change = new['state_dict'][changed[0]] - old['state_dict'][changed[0]]
    torch.testing.assert_close(change, torch.tensor(new['meta']['class_bias']))
    assert 'optimizer' not in new
    assert new['meta']['iter'] == 2

    # what it expects of itself is what is found from its logits, without the weights
    model, content = load_segmentor(cfg, 'config', checkpoint)
    logits, drawn = sampled_logits(model, split_with_test_pipeline(cfg, 'train'), 300)
    assert drawn == 4
    assert logits.shape[1] == 11
    offset = belief_offset(cfg, model.decode_head, content)
    np.testing.assert_allclose(offset, -np.log([0.5] * 10 + [2.0]))
    believed = (logits + torch.from_numpy(offset)).float().softmax(1)

    def expected(bias):
        decided = torch.nn.functional.one_hot((logits + bias).argmax(1), 11).float()
        return expected_iou(believed, decided)[believed.sum(0) >= 20].mean().item()

    assert expected(change) > expected(torch.from_numpy(offset)) + 0.001
    assert expected(change) > expected(torch.zeros(11))


def test_fit_bias_takes_back_weights_by_class_name(trained, capsys):
    config, checkpoint, cfg = trained
    changes = []
    for weights in (dict(car=4.0), [1.0] * 8 + [4.0] + [1.0] * 2):
        named = cfg.copy()
        named.model.decode_head.loss_decode.class_weight = weights
        named.dump(config)
        assert main(['fit-bias', str(config), str(checkpoint)]) == 0
        changes.append(load(checkpoint.with_name('bias_iter_2.pth'))['meta']['class_bias'])
    assert changes[0] == changes[1]


def test_fit_bias_takes_so_many_images_of_the_split_and_the_same_each_time(trained):
    config, checkpoint, cfg = trained
    for name in ('one', 'two'):
        command = ['fit-bias', str(config), str(checkpoint), '--images', '1', '--split', 'val']
        main([*command, '--out', str(checkpoint.with_name(f'{name}.pth'))])
    one, two = (load(checkpoint.with_name(f'{name}.pth'))['meta']['class_bias'] for name in ('one', 'two'))
    assert one == two
    wrapped = dict(type='RepeatDataset', times=3, dataset=cfg.train_dataloader.dataset)
    cfg.train_dataloader.dataset = dict(type='ConcatDataset', datasets=[wrapped, cfg.val_dataloader.dataset])
    found = split_with_test_pipeline(cfg, 'train')
    assert [len(dataset) for dataset in found] == [4, 2]
    steps = [type(step).__name__ for step in found[0].pipeline.transforms]
    assert steps == [step.type for step in cfg.test_dataloader.dataset.pipeline]


def test_fit_bias_of_a_single_output_channel_reaches_the_threshold_of_the_head(small_config, tmp_path):
    cfg = small_config(BALANCED)
    names = ('road', 'pole')
    for split in ('train', 'val', 'test'):
        cfg[f'{split}_dataloader'].dataset.metainfo = dict(classes=names, palette=[[0, 0, 0], [255, 0, 0]])
    cfg.model.decode_head.update(num_classes=2, out_channels=1, threshold=0.3)
    cfg.model.decode_head.loss_decode = dict(type='WeightedCrossEntropyLoss')
    config, checkpoint = tmp_path / 'config.py', tmp_path / 'iter_2.pth'
    cfg.dump(config)
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    nn.init.normal_(model.decode_head.conv_seg.weight, std=5.0)
    torch.save(dict(state_dict=model.state_dict()), checkpoint)
    assert main(['fit-bias', str(config), str(checkpoint)]) == 0
    (change,) = load(checkpoint.with_name('bias_iter_2.pth'))['meta']['class_bias']
    model, _ = load_segmentor(cfg, 'config', checkpoint)
    logits, _ = sampled_logits(model, split_with_test_pipeline(cfg, 'train'), 4)
    assert (logits[:, 0] == 0).all()
    bias = fit_class_bias(logits).bias
    assert change == pytest.approx(bias[1] - bias[0] + np.log(0.3 / 0.7), abs=1e-5)


def test_fit_bias_says_what_it_cannot_do(trained, capsys, tmp_path):
    config, checkpoint, cfg = trained
    assert main(['fit-bias', str(config), str(checkpoint)]) == 0
    corrected = str(checkpoint.with_name('bias_iter_2.pth'))
    capsys.readouterr()
    other = tmp_path / 'other.py'
    no_bias = cfg.copy()
    no_bias.train_dataloader = None
    no_bias.dump(other)
    foreign = cfg.copy()
    foreign.model.decode_head.type = 'NoSuchHead'
    foreign.dump(tmp_path / 'foreign.py')
    (tmp_path / 'empty.pth').write_bytes(b'')
    (tmp_path / 'text.pth').write_text('no weights')
    torch.save([1], tmp_path / 'list.pth')
    torch.save(torch.load(checkpoint, weights_only=False)['state_dict'], tmp_path / 'bare.pth')
    for arguments, code, words in [
        ([config, corrected], 1, 'was corrected before'),
        ([config, checkpoint, '--out', checkpoint], 2, 'is the checkpoint itself'),
        ([config, checkpoint, '--images', '0'], 2, '--images must be at least 1, got 0'),
        ([config, tmp_path / 'none.pth'], 1, 'there is no such checkpoint'),
        ([other, checkpoint], 1, 'the config has no train_dataloader'),
        (
            [tmp_path / 'foreign.py', checkpoint],
            1,
            'foreign.py has a model that cannot be built: NoSuchHead is not in the',
        ),
        ([config, tmp_path / 'empty.pth'], 1, 'empty.pth is no checkpoint that torch can read'),
        ([config, tmp_path / 'text.pth'], 1, 'text.pth is '),  # damaged, or nothing that can be read
        ([config, tmp_path / 'list.pth'], 1, "list.pth holds no 'state_dict'"),
        ([config, tmp_path / 'bare.pth'], 1, "bare.pth holds no 'state_dict'"),
    ]:
        with pytest.raises(SystemExit) as ended:
            main(['fit-bias', *map(str, arguments)])
        assert ended.value.code == code
        assert words in capsys.readouterr().err


def test_a_model_without_a_classifier_layer_is_refused():
    model = nn.Module()
    model.decode_head = nn.Linear(2, 2)
    with pytest.raises(TypeError, match=r'fit-bias needs the logits of a conv_seg, which Linear of Module'):
        classifying_head(model, 'fit-bias')
