import copy
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from mmengine.logging import MessageHub

from mmseg_imbalance.class_weight import ClassWeight, WeightRecord
from mmseg_imbalance.frequency import CITYSCAPES_TRAIN
from mmseg_imbalance.losses import CombinedWeightedLoss, WeightedCrossEntropyLoss, WeightedDiceLoss
from mmseg_imbalance.weighting import class_weights

WEIGHT = [0.2, 3.0, 1.0, 0.0, 1.7]
CLASSES = ['a', 'b', 'c', 'd', 'e']


@pytest.fixture
def dataset_meta():
    """The class names as a runner leaves them in the message hub."""
    hub = MessageHub.get_current_instance()
    hub.update_info('dataset_meta', dict(classes=CLASSES))
    yield
    hub.pop_info('dataset_meta')


@pytest.mark.parametrize(
    'given',
    [
        [1.0, -1.0],
        [1.0, math.nan],
        [math.inf, 1.0],
        [0.0, 0.0],
        [],
        ['x'],
        [[1.0, 2.0]],
        {'a': -2.0},
        {'a': math.nan},
    ],
)
def test_impossible_weights_are_refused_with_the_values(given):
    with pytest.raises(ValueError, match='must be finite numbers, at least 0'):
        CombinedWeightedLoss(class_weight=given)


@pytest.mark.parametrize('given', [3, 2.5, True])
def test_one_number_is_no_class_weight(given):
    with pytest.raises(TypeError, match=r'class_weight must be None, .*got'):
        CombinedWeightedLoss(class_weight=given)


def test_wrong_length_says_both_lengths(make_batch):
    with pytest.raises(ValueError, match=r'holds 2 numbers, \[1.0, 2.0\], but the head predicts 5'):
        WeightedDiceLoss([1.0, 2.0])(*make_batch())


@pytest.mark.parametrize('given', [np.array(WEIGHT), torch.tensor(WEIGHT), tuple(WEIGHT)])
def test_weights_come_as_any_sequence(make_batch, given):
    logits, target = make_batch()
    torch.testing.assert_close(
        WeightedDiceLoss(given)(logits, target), WeightedDiceLoss(WEIGHT)(logits, target)
    )


@pytest.mark.usefixtures('dataset_meta')
def test_a_dict_names_classes_and_the_others_weigh_1(make_batch):
    logits, target = make_batch()
    named = WeightedCrossEntropyLoss(dict(d=4.0, b=0.5))
    expected = WeightedCrossEntropyLoss([1, 0.5, 1, 4, 1])(logits, target)
    torch.testing.assert_close(named(logits, target), expected)


@pytest.mark.usefixtures('dataset_meta')
def test_an_unknown_class_name_says_which_ones_there_are(make_batch):
    with pytest.raises(ValueError, match=r"names \['rider'\].*classes are \['a', 'b'"):
        WeightedCrossEntropyLoss(dict(rider=4.0))(*make_batch())


@pytest.mark.usefixtures('dataset_meta')
def test_a_dict_may_switch_off_a_class(make_batch):
    logits, target = make_batch()
    expected = WeightedCrossEntropyLoss([0, 1, 1, 1, 1])(logits, target)
    torch.testing.assert_close(WeightedCrossEntropyLoss(dict(a=0.0))(logits, target), expected)


def test_a_dict_outside_a_runner_says_what_to_give_instead(make_batch):
    with pytest.raises(RuntimeError, match='give a list'):
        WeightedCrossEntropyLoss(dict(a=4.0))(*make_batch())


def test_auto_before_the_hook_says_which_hook_to_add(make_batch):
    loss = CombinedWeightedLoss(class_weight='auto')
    with pytest.raises(RuntimeError, match=r"custom_hooks = \[dict\(type='ClassWeightHook'\)\]"):
        loss(*make_batch())
    loss.class_weight.set_weights(WEIGHT)
    torch.testing.assert_close(loss(*make_batch()), CombinedWeightedLoss(class_weight=WEIGHT)(*make_batch()))


def test_a_path_gives_the_weights_of_the_file(make_batch, tmp_path):
    path = tmp_path / 'weights.json'
    path.write_text(json.dumps(dict(classes=CLASSES, weights=WEIGHT)))
    expected = WeightedDiceLoss(WEIGHT)(*make_batch())
    for given in (path, str(path)):
        torch.testing.assert_close(WeightedDiceLoss(given)(*make_batch()), expected)


@pytest.mark.usefixtures('dataset_meta')
def test_a_file_for_other_classes_is_refused(make_batch, tmp_path):
    path = tmp_path / 'weights.json'
    path.write_text(json.dumps(dict(classes=CLASSES[::-1], weights=WEIGHT)))
    with pytest.raises(ValueError, match=r"is for the classes \['e'.*data set has \['a'"):
        WeightedDiceLoss(str(path))(*make_batch())


def test_missing_and_foreign_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere.json' is neither 'auto' nor a file"):
        WeightedDiceLoss(str(tmp_path / 'nowhere.json'))
    with pytest.raises(ValueError, match='is not a file of'):
        WeightedDiceLoss(str(tmp_path))
    for content in ('{', '[1, 2]', '{"classes": []}'):
        (tmp_path / 'foreign.json').write_text(content)
        with pytest.raises(ValueError, match=r'foreign.json. is not a file of'):
            WeightedDiceLoss(str(tmp_path / 'foreign.json'))


def test_a_record_holds_the_weights_exactly_in_its_file(tmp_path):
    weights = class_weights(CITYSCAPES_TRAIN, power=0.5)
    record = WeightRecord.count(CITYSCAPES_TRAIN, weights, 'sqrt_inv_freq', dict(power=0.5), 100)
    record.save(tmp_path / 'folder' / 'weights.json')
    assert WeightRecord.load(tmp_path / 'folder' / 'weights.json') == record
    assert record.weights == weights.tolist()
    assert record.pixels == CITYSCAPES_TRAIN.pixels.tolist()
    assert tuple(record.classes) == CITYSCAPES_TRAIN.classes
    content = json.loads((tmp_path / 'folder' / 'weights.json').read_text())
    made = dict(scheme='sqrt_inv_freq', options=dict(power=0.5), max_images=100)
    assert {name: content[name] for name in made} == made


@pytest.mark.usefixtures('dataset_meta')
@pytest.mark.parametrize('spec', [WEIGHT, dict(a=2.0), 'auto'], ids=['list', 'dict', 'auto'])
def test_training_follows_a_first_call_in_inference_mode(make_batch, spec):
    logits, target = make_batch()
    loss = WeightedCrossEntropyLoss(spec, divide_by='pixels', logit_adjustment=1.0)
    if spec == 'auto':
        loss.class_weight.set_weights(WEIGHT)
    loss.class_weight.set_pixels([5, 4, 3, 2, 1])
    with torch.inference_mode():
        loss(logits, target)
    loss(logits.requires_grad_(), target).backward()


def test_a_record_says_where_other_counts_differ():
    record = WeightRecord.count(CITYSCAPES_TRAIN, class_weights(CITYSCAPES_TRAIN))
    assert record.changes(CITYSCAPES_TRAIN) == []
    pixels, images = CITYSCAPES_TRAIN.pixels.copy(), CITYSCAPES_TRAIN.images.copy()
    pixels[1] += 1
    images[18] = 0
    assert record.changes(replace(CITYSCAPES_TRAIN, pixels=pixels, images=images)) == [
        'sidewalk: 336,090,793 pixels in 2,811 images, now 336,090,794 in 2,811',
        'bicycle: 22,861,233 pixels in 1,646 images, now 22,861,233 in 0',
    ]
    assert WeightRecord(CLASSES, WEIGHT).changes(CITYSCAPES_TRAIN) == []


def test_a_file_of_weights_has_the_class_names_in_any_script(tmp_path):
    record = WeightRecord(['道路', 'Straße', '🚗'], [1.0, 2.0, 3.0])
    record.save(tmp_path / 'weights.json')
    assert WeightRecord.load(tmp_path / 'weights.json') == record
    assert '"道路"' in (tmp_path / 'weights.json').read_text(encoding='utf-8')


def test_what_is_still_to_be_filled():
    given, auto, prior = ClassWeight([1.0, 2.0]), ClassWeight('auto'), ClassWeight(with_prior=True)
    assert [weight.waiting for weight in (given, auto, prior)] == [False, True, False]
    assert [weight.needs_pixels for weight in (given, auto, prior)] == [False, False, True]
    copied = copy.deepcopy(auto)  # as averaged models do
    auto.set_weights([1.0, 2.0])
    prior.set_pixels([30, 10])
    assert not auto.waiting
    assert not prior.needs_pixels
    assert copied.waiting
    logits = torch.zeros(1, 2, 3, 3)
    assert auto.for_logits(logits).tolist() == [1.0, 2.0]
    assert prior.for_logits(logits) is None
    torch.testing.assert_close(prior.logit_bias(logits, 2.0), 2 * torch.tensor([0.75, 0.25]).log())


def test_names_that_a_call_in_inference_mode_looks_up_can_be_trained_with():
    hub = MessageHub.get_instance('inference')
    hub.update_info('dataset_meta', dict(classes=('a', 'b', 'c')))
    loss = WeightedCrossEntropyLoss(class_weight=dict(b=3.0))
    logits, target = torch.randn(2, 3, 4, 5), torch.randint(0, 3, (2, 4, 5))
    with torch.inference_mode():
        loss(logits, target)
    logits.requires_grad_()
    loss(logits, target).backward()
    assert logits.grad.isfinite().all()


def test_what_a_call_in_inference_mode_moves_can_be_trained_with():
    weight = ClassWeight([1.0, 2.0, 3.0], True, 'loss')
    weight.set_pixels([10, 20, 30])
    with torch.inference_mode():
        logits = torch.empty(1, 3, 2, 2, device='meta')
        moved = weight.for_logits(logits), weight.logit_bias(logits, 2.0)
    assert all(x.device.type == 'meta' for x in moved)
    assert not weight.values.is_inference()
    assert not weight.logit_bias(logits, 2.0).is_inference()


# of the region term


@pytest.mark.usefixtures('dataset_meta')
def test_the_region_term_takes_weights_in_every_form(make_batch, tmp_path):
    batch = make_batch()
    path = tmp_path / 'weights.json'
    path.write_text(json.dumps(dict(classes=CLASSES, weights=[0, 1, 1, 1, 2])))
    expected = CombinedWeightedLoss(class_weight=WEIGHT, region_class_weight=[0, 1, 1, 1, 2])(*batch)
    auto = CombinedWeightedLoss(class_weight=WEIGHT, region_class_weight='auto')
    assert [weight.waiting for weight in auto.class_weights] == [False, True]
    with pytest.raises(
        RuntimeError, match=r"Loss\(region_class_weight='auto'\).*call region_class_weight.set_w"
    ):
        auto(*batch)
    auto.region_class_weight.set_weights([0, 1, 1, 1, 2])
    torch.testing.assert_close(auto(*batch), expected)
    for given in (dict(a=0.0, e=2.0), path, str(path), np.array([0, 1, 1, 1, 2])):
        loss = CombinedWeightedLoss(class_weight=WEIGHT, region_class_weight=given)
        torch.testing.assert_close(loss(*batch), expected)


@pytest.mark.usefixtures('dataset_meta')
def test_errors_name_the_weights_of_the_region_term(make_batch, tmp_path):
    path = tmp_path / 'weights.json'
    path.write_text(json.dumps(dict(classes=CLASSES[::-1], weights=WEIGHT)))
    for given, kind, message in (
        ([1.0, -1.0], ValueError, r'region_class_weight=\[1.0, -1.0\] must be finite numbers, at least 0'),
        (dict(a=-1.0), ValueError, r"region_class_weight=\{'a': -1.0\} must be finite"),
        (2.0, TypeError, "region_class_weight must be None, 'same', 'auto', a list .*got 2.0"),
        ('smae', FileNotFoundError, "region_class_weight='smae' is neither 'same', 'auto' nor a file"),
        (str(tmp_path), ValueError, 'region_class_weight=.* is not a file of'),
        (
            [1.0, 2.0],
            ValueError,
            r'region_class_weight holds 2 numbers, \[1.0, 2.0\], but the head predicts 5',
        ),
        (dict(rider=1.0), ValueError, r"region_class_weight names \['rider'\]"),
        (path, ValueError, r"the region_class_weight file is for the classes \['e'"),
    ):
        with pytest.raises(kind, match=message):
            CombinedWeightedLoss(region_class_weight=given)(*make_batch())


def test_weights_are_scaled_anew_where_the_pixels_change():
    weight, logits = ClassWeight([1.0, 3.0], mean_of_1=True), torch.zeros(1, 2, 1, 1)
    weight.set_pixels([1, 1])
    assert weight.for_logits(logits).tolist() == [0.5, 1.5]
    weight.set_pixels([3, 1])
    assert weight.for_logits(logits).tolist() == pytest.approx([1 / 1.5, 3 / 1.5])


def test_later_weights_come_to_where_the_earlier_ones_lay():
    weight = ClassWeight([1.0, 3.0])
    weight.for_logits(torch.zeros(1, 2, 1, 1, device='meta'))
    weight.set_weights([2.0, 2.0])
    assert weight.values.device.type == 'meta'


def test_later_weights_are_scaled_anew():
    weight, logits = ClassWeight([1.0, 3.0], mean_of_1=True), torch.zeros(1, 2, 1, 1)
    weight.set_pixels([1, 1])
    assert weight.for_logits(logits).tolist() == [0.5, 1.5]
    weight.set_weights([1.0, 1.0])  # as a power_schedule that fades
    assert weight.for_logits(logits).tolist() == [1.0, 1.0]


def test_the_prior_beside_a_file_of_weights_is_that_of_the_training_data(tmp_path):
    WeightRecord(['a', 'b'], [1.0, 3.0], pixels=[1, 1]).save(tmp_path / 'weights.json')
    weight = ClassWeight(str(tmp_path / 'weights.json'), with_prior=True, mean_of_1=True)
    assert weight.needs_pixels  # the hook hands over what it has counted
