"""The feature heads beside the framework's: the same numbers, without a tensor of label size."""

import copy

import pytest
import torch
from conftest import REPOSITORY
from dispatch import Largest
from mmengine.config import Config
from mmengine.optim import OptimWrapper
from mmengine.runner import turn_on_activation_checkpointing
from mmengine.structures import PixelData
from mmseg.models.decode_heads import FCNHead
from mmseg.registry import MODELS
from mmseg.structures import SegDataSample
from torch.utils.checkpoint import checkpoint

from mmseg_imbalance import heads
from mmseg_imbalance.losses import WeightedCrossEntropyLoss
from mmseg_imbalance.ops import strips

CLASSES = 5
WEIGHT = [0.2, 3.0, 1.0, 0.5, 1.7]
LABEL_SIZE = (46, 61)
SIZES = [(12, 16), (12, 16), (6, 8), (3, 4)]

COMBINED = dict(type='CombinedWeightedLoss', class_weight=WEIGHT)
CE = dict(type='WeightedCrossEntropyLoss', class_weight=WEIGHT, label_smoothing=0.1)
DICE = dict(type='WeightedDiceLoss', class_weight=WEIGHT, region_reduction='batch')
THEIRS = dict(type='CrossEntropyLoss', avg_non_ignore=True)
LOSSES = dict(
    combined=COMBINED,
    ce=CE,
    list=[CE, DICE, dict(type='WeightedDiceLoss', loss_weight=0.3)],  # two of one name
    mixed=[COMBINED, THEIRS, CE],  # two of one name, ours and theirs
    theirs=THEIRS,
)

ONE = dict(in_channels=8, in_index=2)
ALL = dict(in_channels=[8] * 4, in_index=[0, 1, 2, 3])
HEADS = dict(
    ASPPHead=dict(ONE, dilations=(1, 2)),
    DepthwiseSeparableASPPHead=dict(ONE, dilations=(1, 2), c1_in_channels=8, c1_channels=4),
    SegformerHead=ALL,
    FCNHead=dict(ONE, num_convs=1),
    UPerHead=dict(ALL, pool_scales=(1, 2)),
    PSPHead=dict(ONE, pool_scales=(1, 2)),
    DAHead=dict(ONE, pam_channels=4),
    EncHead=dict(in_channels=[8, 8], in_index=[1, 2], num_codes=3),
    STDCHead=dict(ONE, num_convs=1, num_classes=2),
    OCRHead=dict(ONE, ocr_channels=4),
    SegmenterMaskTransformerHead=dict(ONE, num_layers=1, num_heads=2, embed_dims=8),
)
NAMED = ('ASPPHead', 'DepthwiseSeparableASPPHead', 'SegformerHead')


def config(type, loss, **options):
    options = dict(channels=8, num_classes=CLASSES, dropout_ratio=0.1) | HEADS[type] | options
    if options['num_classes'] == 2:  # the weights are for five classes
        loss = [{k: v for k, v in one.items() if k != 'class_weight'} for one in listed(loss)]
        loss = loss[0] if len(loss) == 1 else loss
    if type != 'SegmenterMaskTransformerHead':  # its norm_cfg is for the tokens
        options = dict(norm_cfg=dict(type='BN')) | options
    return dict(type=type, loss_decode=loss) | options


def listed(loss):
    return loss if isinstance(loss, list) else [loss]


def featured(type, prefix=''):
    if type in NAMED:
        return dict(type=f'{prefix}Feature{type}')
    return dict(type=f'{prefix}FeatureHead', base=type)


def pair(type, loss, dtype=torch.float64, trained=True, **options):
    """(the framework's head, ours), built from the same seed; ``trained``: no weights of zero or one."""
    plain = config(type, loss, **options)
    built = []
    for cfg in (plain, plain | featured(type)):
        torch.manual_seed(0)
        head = MODELS.build(copy.deepcopy(cfg))
        head.init_weights()
        with torch.no_grad():
            # without, pixels of zero features would have equal logits, among which topk takes any
            for p in head.parameters() if trained else ():
                p.add_(0.2 * torch.randn_like(p))
        built.append(head.to(dtype).train())
    return built


def ours(type, loss, **options):
    return pair(type, loss, **options)[1]


def batch(dtype=torch.float64, classes=CLASSES):
    """(feature maps, data samples): a third of the label is ignored, class 4 occurs in one image alone."""
    generator = torch.Generator().manual_seed(1)
    maps = [torch.randn(2, 8, *size, generator=generator, dtype=dtype, requires_grad=True) for size in SIZES]
    label = torch.randint(0, classes, (2, 1, *LABEL_SIZE), generator=generator)
    label[0][label[0] == 4] = 1
    label[:, :, :15] = 255
    samples = [
        SegDataSample(gt_sem_seg=PixelData(data=image), metainfo=dict(img_shape=LABEL_SIZE))
        for image in label
    ]
    return maps, samples


def step(head, dtype=torch.float64, seed=2):
    """(losses and accuracy, gradients of parameters and inputs) of one training step."""
    maps, samples = batch(dtype, head.num_classes)
    torch.manual_seed(seed)  # dropout
    if head.__class__.__name__.endswith('OCRHead'):
        losses = head.loss(maps, torch.sin(maps[2][:, :CLASSES]), samples, None)
    else:
        losses = head.loss(maps, samples, None)
    sum(value.sum() for name, value in losses.items() if 'loss' in name).backward()
    gradients = {name: p.grad for name, p in head.named_parameters()}
    return losses, gradients | {f'input {i}': x.grad for i, x in enumerate(maps)}


def assert_same(plain, feature, **tolerance):
    """Equal names, order and values; the accuracy, which is float32 in both, to its last digit or two.

    Beside them, a feature head logs the terms of a combined loss.
    """
    terms = [name for name in feature if name not in plain]
    assert all(name.split('.')[-1] in ('combined_ce', 'combined_dice') for name in terms)
    assert list(plain) == [name for name in feature if name not in terms]
    for name, value in plain.items():
        if value is None:
            assert feature[name] is None, name
            continue
        limits = dict(rtol=1e-6, atol=0) if name.endswith('acc_seg') else tolerance
        torch.testing.assert_close(
            feature[name], value, **limits, msg=lambda text, name=name: f'{name}: {text}'
        )


def assert_same_step(type, loss, **options):
    plain, feature = (step(head) for head in pair(type, loss, **options))
    assert_same(plain[0], feature[0], rtol=1e-9, atol=1e-12)
    assert_same(plain[1], feature[1], rtol=1e-7, atol=1e-10)
    assert any(g is not None and g.abs().sum() > 1e-3 for g in feature[1].values())
    return feature


@pytest.fixture(autouse=True)
def one_thread():
    """A dispatch mode sees the operations of its own thread alone."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# the same numbers


@pytest.mark.parametrize('align_corners', [False, True])
@pytest.mark.parametrize('loss', LOSSES)
@pytest.mark.parametrize('type', HEADS)
@pytest.mark.filterwarnings('ignore:When align_corners', 'ignore:For binary segmentation')
def test_losses_accuracy_and_gradients_are_those_of_the_frameworks_head(type, loss, align_corners):
    assert_same_step(type, LOSSES[loss], align_corners=align_corners)


@pytest.mark.parametrize(
    ('sampler', 'loss'),
    [
        (dict(thresh=0.3, min_kept=50), COMBINED),
        (dict(thresh=0.3, min_kept=50), [COMBINED, THEIRS]),
        (dict(min_kept=50), THEIRS),
    ],
)
def test_an_ohem_sampler_weighs_the_same_pixels(sampler, loss):
    weighed, _ = assert_same_step('FCNHead', loss, sampler=dict(type='OHEMPixelSampler', **sampler))
    plain, _ = step(ours('FCNHead', loss))
    assert all(weighed[name] != plain[name] for name in plain if 'loss' in name)


def test_a_sampler_that_asks_for_the_loss_of_each_pixel_is_refused_as_in_any_head():
    head = ours('FCNHead', COMBINED, sampler=dict(type='OHEMPixelSampler', min_kept=50))
    with pytest.raises(ValueError, match='thresh'):
        step(head)


@pytest.mark.parametrize('loss', ['BoundaryLoss', 'OhemCrossEntropy', 'SiLogLoss'])
def test_a_loss_that_a_head_cannot_call_is_named_with_it(loss):
    theirs, feature = pair('SegformerHead', [COMBINED, dict(type=loss)])
    message = f'SegformerHead calls its losses with logits, .* but {loss} takes .*Take it out of loss_decode'
    with pytest.raises(TypeError, match='Feature' + message):
        step(feature)
    with pytest.raises(TypeError, match='decode_head: ' + message):
        heads.check_heads(torch.nn.ModuleDict(dict(decode_head=theirs)))


ONE_CHANNEL = dict(num_classes=2, out_channels=1, threshold=0.5)
OHEM = dict(type='OHEMPixelSampler', thresh=0.6, min_kept=50)


@pytest.mark.filterwarnings('ignore:For binary segmentation')
def test_heads_that_work_pass_the_check():
    mixed = [COMBINED, THEIRS, dict(type='DiceLoss'), dict(type='LovaszLoss', per_image=True)]
    boundary = [dict(type='CrossEntropyLoss'), dict(type='BoundaryLoss')]  # not ours, not our concern
    by_position = dict(in_channels=8, channels=8, num_classes=CLASSES)
    pidnet = [CE, COMBINED, dict(type='BoundaryLoss'), CE]  # the third gets what it takes
    for head in (
        MODELS.build(dict(type='PIDHead', loss_decode=pidnet, **by_position)),
        *pair('FCNHead', mixed, sampler=OHEM),
        ours('FCNHead', COMBINED, sampler=OHEM, **ONE_CHANNEL),
        *pair('FCNHead', boundary),
    ):
        heads.check_heads(torch.nn.ModuleList([head]))
    kernels = MODELS.build(  # K-Net's has no losses of its own
        dict(
            type='IterativeDecodeHead',
            num_stages=0,
            kernel_update_head=[],
            kernel_generate_head=dict(
                type='FCNHead', in_channels=8, channels=8, num_classes=3, loss_decode=COMBINED
            ),
        )
    )
    heads.check_heads(torch.nn.ModuleList([kernels]))
    theirs, _ = pair('FCNHead', COMBINED, sampler=OHEM, **ONE_CHANNEL)
    with pytest.raises(ValueError, match=r"0: the sampler of FCNHead .* out_channels=1.*base='FCNHead'"):
        heads.check_heads(torch.nn.ModuleList([theirs]))


def test_an_ohem_sampler_takes_one_output_channel_as_two():
    loss = dict(type='CombinedWeightedLoss', class_weight=[1, 5])
    one = MODELS.build(
        dict(
            type='FeatureHead',
            base='FCNHead',
            **HEADS['FCNHead'],
            **ONE_CHANNEL,
            channels=8,
            dropout_ratio=0,
            sampler=OHEM,
            norm_cfg=dict(type='BN'),
            loss_decode=loss,
        )
    )
    two = MODELS.build(
        dict(
            type='FeatureHead',
            base='FCNHead',
            **HEADS['FCNHead'],
            num_classes=2,
            channels=8,
            dropout_ratio=0,
            sampler=OHEM,
            norm_cfg=dict(type='BN'),
            loss_decode=loss,
        )
    )
    state = one.state_dict()
    for name in ('conv_seg.weight', 'conv_seg.bias'):
        state[name] = torch.cat([torch.zeros_like(state[name]), state[name]])
    two.load_state_dict(state)
    (losses, _), (expected, _) = (step(head.double().train()) for head in (one, two))
    torch.testing.assert_close(losses['loss_combined'], expected['loss_combined'])
    one.sampler.thresh = 1.1  # all pixels
    assert step(one)[0]['loss_combined'] != losses['loss_combined']
    one.sampler.thresh = None
    with pytest.raises(ValueError, match=r'thresh=0.7\) in a Feature head, or with out_channels=2'):
        step(one)


@pytest.mark.parametrize('ignore_index', [7, 255, None])
def test_the_heads_own_ignore_index_counts(ignore_index):
    maps, samples = batch()
    for sample in samples:
        label = sample.gt_sem_seg.data
        label[label == 255] = 0 if ignore_index is None else ignore_index
    both = pair('FCNHead', CE, dropout_ratio=0, ignore_index=ignore_index)
    assert_same(*(head.loss(maps, samples, None) for head in both), rtol=1e-9, atol=1e-12)


def test_all_pixels_ignored():
    maps, samples = batch()
    for sample in samples:
        sample.gt_sem_seg.data.fill_(255)
    results = [head.loss(maps, samples, None) for head in pair('FCNHead', COMBINED, dropout_ratio=0)]
    assert_same(*results, rtol=0, atol=0)


@pytest.mark.parametrize('loss', [dict(COMBINED, class_weight=[1, 5]), dict(THEIRS, use_sigmoid=True)])
@pytest.mark.filterwarnings('ignore:For binary segmentation')
def test_one_output_channel(loss):
    maps, samples = batch(classes=2)
    options = dict(dropout_ratio=0, num_classes=2, out_channels=1, threshold=0.5)
    results = []
    for cfg in (config('FCNHead', None), config('FCNHead', None) | featured('FCNHead')):
        torch.manual_seed(0)
        head = MODELS.build(cfg | options | dict(loss_decode=loss)).double()
        results.append(head.loss(maps, samples, None))
    assert_same(*results, rtol=1e-9, atol=1e-12)


def test_logits_of_label_size():
    _, samples = batch()
    logits = torch.randn(2, CLASSES, *LABEL_SIZE, dtype=torch.float64)
    for loss in (COMBINED, [COMBINED, THEIRS]):
        plain, feature = (head.loss_by_feat(logits, samples) for head in pair('FCNHead', loss))
        assert_same(plain, feature, rtol=1e-9, atol=1e-12)


class ShiftedLoss(WeightedCrossEntropyLoss):
    """A loss whose argmax is not the prediction's, as of adjusted logits."""

    def forward(self, pred, target, **kwargs):
        value = super().forward(pred + 5 * torch.arange(pred.shape[1])[:, None, None], target, **kwargs)
        self.correct = None
        return value


@pytest.mark.parametrize('ignore_index', [255, None])
def test_the_accuracy_is_of_the_prediction_where_every_loss_changes_the_logits(ignore_index, monkeypatch):
    monkeypatch.setattr(heads, 'resize', None)
    maps, samples = batch()
    if ignore_index is None:
        for sample in samples:
            sample.gt_sem_seg.data.clamp_(max=4)
    plain, feature = pair('FCNHead', dict(type=ShiftedLoss), dropout_ratio=0, ignore_index=ignore_index)
    assert_same(plain.loss(maps, samples, None), feature.loss(maps, samples, None), rtol=1e-9, atol=1e-12)
    both = ours('FCNHead', [dict(type=ShiftedLoss), COMBINED], dropout_ratio=0, ignore_index=ignore_index)
    torch.testing.assert_close(
        both.loss(maps, samples, None)['acc_seg'], plain.loss(maps, samples, None)['acc_seg']
    )


# memory


@pytest.mark.slow
@pytest.mark.parametrize('type', [*NAMED, 'FCNHead', 'UPerHead', 'DAHead'])
@pytest.mark.parametrize('loss', [COMBINED, [CE, DICE], dict(type=ShiftedLoss)])
def test_training_makes_no_tensor_of_label_size(type, loss, monkeypatch):
    monkeypatch.setattr(strips, 'STRIP_NUMBERS', CLASSES * 4 * LABEL_SIZE[1])
    largest = []
    for head in pair(type, loss):
        with Largest() as record:
            step(head)
        largest.append(record.numel)
    one_image = CLASSES * LABEL_SIZE[0] * LABEL_SIZE[1]
    assert largest[0] >= 2 * one_image
    assert largest[1] < one_image


@pytest.mark.parametrize(
    ('loss', 'sampler', 'times'),
    [
        (COMBINED, None, 0),
        ([CE, DICE], None, 0),
        (THEIRS, None, 1),
        ([COMBINED, THEIRS, CE, dict(type='CrossEntropyLoss')], None, 1),
        (COMBINED, dict(type='OHEMPixelSampler', thresh=0.3, min_kept=50), 1),
        ([COMBINED, THEIRS], dict(type='OHEMPixelSampler', thresh=0.3, min_kept=50), 1),
    ],
)
def test_the_logits_are_resized_once_where_somebody_needs_it(loss, sampler, times, monkeypatch):
    calls = []

    def counted(*args, **kwargs):
        calls.append(args)
        return resize(*args, **kwargs)

    resize = heads.resize
    monkeypatch.setattr(heads, 'resize', counted)
    step(ours('FCNHead', loss, sampler=sampler))
    assert len(calls) == times


# checkpoints and prediction


@pytest.mark.parametrize('type', HEADS)
@pytest.mark.filterwarnings('ignore:For binary segmentation')
def test_the_same_seed_gives_the_same_weights_and_checkpoints_go_both_ways(type):
    plain, feature = pair(type, COMBINED, trained=False)
    assert list(plain.state_dict()) == list(feature.state_dict())
    for name, value in plain.state_dict().items():
        assert torch.equal(value, feature.state_dict()[name]), name
    with torch.no_grad():
        for p in feature.parameters():
            p.add_(1)
    plain.load_state_dict(feature.state_dict(), strict=True)
    feature.load_state_dict(plain.state_dict(), strict=True)


@pytest.mark.parametrize('type', ['ASPPHead', 'SegformerHead', 'UPerHead', 'EncHead'])
def test_predictions_are_the_same(type):
    maps, samples = batch()
    metas = [sample.metainfo for sample in samples]
    plain, feature = (head.eval().predict(maps, metas, None) for head in pair(type, COMBINED))
    assert torch.equal(plain, feature)


# features


class SpyLoss(WeightedCrossEntropyLoss):
    needs_features = True
    fails = False

    def forward(self, pred, target, features=None, **kwargs):
        self.seen = pred, features
        if self.fails:
            raise ArithmeticError
        return super().forward(pred, target, **kwargs)


class PlainSpyLoss(SpyLoss):
    needs_features = False


@pytest.mark.parametrize('type', ['ASPPHead', 'SegformerHead', 'UPerHead', 'DAHead', 'EncHead'])
def test_a_loss_that_needs_features_gets_what_entered_the_classifier(type):
    head = ours(type, [dict(type=PlainSpyLoss), dict(type=SpyLoss)], dropout_ratio=0)
    step(head)
    without, (pred, features) = (loss.seen for loss in head.loss_decode)
    assert without[1] is None
    assert features.requires_grad
    if type == 'DAHead':  # the last of its three outputs, from another classifier
        assert features.shape[2:] == pred.shape[2:]
    else:
        torch.testing.assert_close(head.conv_seg(features), pred)
    assert head.features is None


@pytest.mark.parametrize('fails', [False, True])
def test_features_are_dropped_after_the_losses(fails):
    head = ours('FCNHead', dict(type=SpyLoss))
    head.loss_decode.fails = fails
    maps, samples = batch()
    if fails:
        with pytest.raises(ArithmeticError):
            head.loss(maps, samples, None)
    else:
        head.loss(maps, samples, None)
    assert head.loss_decode.seen[1] is not None
    assert head.features is None


def test_features_are_kept_neither_outside_the_losses_nor_where_no_loss_wants_them():
    maps, samples = batch()
    head = ours('FCNHead', dict(type=SpyLoss))
    head.forward(maps)
    assert head.features is None
    head.eval().predict(maps, [sample.metainfo for sample in samples], None)
    assert head.features is None
    seen = []

    class Watched(PlainSpyLoss):
        def forward(self, *args, **kwargs):
            seen.append(head.features)
            return super().forward(*args, **kwargs)

    head = ours('FCNHead', dict(type=Watched))
    step(head)
    assert seen == [None]


def test_a_head_without_cls_seg_says_what_is_missing_and_who_has_it():
    head = ours('SegmenterMaskTransformerHead', dict(type=SpyLoss))
    with pytest.raises(RuntimeError, match=r'SpyLoss needs .* of FeatureSegmenterMask.*FeatureASPPHead'):
        step(head)


# names


@pytest.mark.parametrize('prefix', ['', 'mmseg_imbalance.'])
@pytest.mark.parametrize('type', ['ASPPHead', 'SegformerHead', 'UPerHead'])
def test_names_with_and_without_the_prefix(type, prefix):
    head = MODELS.build(config(type, COMBINED) | featured(type, prefix))
    assert head.__class__.__name__ == f'Feature{type}'
    assert isinstance(head, MODELS.get(type))
    assert isinstance(copy.deepcopy(head), heads.FeatureKeeper)


def test_base_is_a_name_with_or_without_a_scope_or_a_class():
    @MODELS.register_module(force=True)
    class SomebodysHead(FCNHead):
        pass

    options = {k: v for k, v in config('FCNHead', COMBINED).items() if k != 'type'}
    made = [
        type(heads.FeatureHead(base, **options)) for base in ('FCNHead', 'mmseg.FCNHead', FCNHead, 'FCNHead')
    ]
    assert len(set(made)) == 1
    assert made[0].__name__ == 'FeatureFCNHead'
    own = heads.FeatureHead('SomebodysHead', **options)
    assert isinstance(own, SomebodysHead)
    assert type(heads.FeatureHead(type(own), **options)) is type(own)


@pytest.mark.parametrize('base', ['UPer', 'mmseg.NoHead', 'CrossEntropyLoss', 'FeatureHead', int, None])
def test_a_base_that_is_no_decode_head_is_named(base):
    with pytest.raises(ValueError, match=r"derived from MMSegmentation's BaseDecodeHead.* got ") as error:
        heads.FeatureHead(base, **config('FCNHead', COMBINED))
    assert repr(base) in str(error.value)


@pytest.mark.parametrize('type', ['DDRHead', 'PIDHead'])
def test_a_head_that_calls_losses_by_position_stays_as_it_is(type):
    count = dict(DDRHead=2, PIDHead=4)[type]
    losses = [CE, COMBINED, dict(type='BoundaryLoss'), CE][:count]
    generator = torch.Generator().manual_seed(1)
    channels = dict(DDRHead=(4, 8), PIDHead=(4, 8, 4))[type]
    maps = [torch.randn(2, c, 12, 16, generator=generator) for c in channels]
    _, samples = batch()
    for sample in samples:
        label = sample.gt_sem_seg.data
        label.clamp_(max=4)
        sample.gt_edge_map = PixelData(data=(label == 1).long())
    results = []
    for own in (dict(type=type), dict(type='FeatureHead', base=type)):
        torch.manual_seed(0)
        options = dict(in_channels=8, channels=8, num_classes=CLASSES, loss_decode=losses)
        results.append(MODELS.build(options | own).loss(maps, samples, None))
    assert_same(*results, rtol=0, atol=0)


# mixed precision and activation checkpointing


@pytest.mark.parametrize(
    ('device', 'dtype'),
    [
        ('cpu', torch.bfloat16),
        pytest.param(
            'cuda',
            torch.float16,
            marks=pytest.mark.skipif(not torch.cuda.is_available(), reason='float16 autocast wants CUDA'),
        ),
    ],
)
@pytest.mark.parametrize('type', ['ASPPHead', 'SegformerHead'])
def test_mixed_precision(type, device, dtype):
    head = ours(type, COMBINED, dropout_ratio=0, dtype=torch.float32).to(device)
    maps, samples = batch(torch.float32)
    maps = [x.to(device) for x in maps]
    samples = [sample.to(device) for sample in samples]
    exact = head.loss(maps, samples, None)
    with torch.autocast(device, dtype):
        assert head.forward(maps).dtype == dtype
        losses = head.loss(maps, samples, None)
    assert all(value.dtype == torch.float32 for value in losses.values())
    assert losses['loss_combined'].item() == pytest.approx(exact['loss_combined'].item(), rel=1e-2)
    losses['loss_combined'].backward()
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in head.parameters())


def checkpointed(head, reentrant):
    forward = head.forward
    head.forward = lambda maps: checkpoint(lambda *tensors: forward(tensors), *maps, use_reentrant=reentrant)


@pytest.mark.parametrize('loss', [COMBINED, dict(type=SpyLoss)])
@pytest.mark.parametrize('reentrant', [False, True])
def test_activation_checkpointing_keeps_the_numbers_and_no_features(reentrant, loss):
    direct, again = (ours('SegformerHead', loss) for _ in range(2))
    checkpointed(again, reentrant)
    plain, repeated = step(direct), step(again)
    assert_same(plain[0], repeated[0], rtol=1e-9, atol=1e-12)
    assert_same(plain[1], repeated[1], rtol=1e-7, atol=1e-10)
    assert again.features is None
    if loss is not COMBINED:
        torch.testing.assert_close(again.loss_decode.seen[1], direct.loss_decode.seen[1])


# whole models


def small_model(name, feature):
    """The model of a config of this repository; without ``feature`` its heads are the framework's."""
    cfg = Config.fromfile(REPOSITORY / 'configs' / name).model
    cfg.data_preprocessor.size = (64, 64)
    for head in (cfg.decode_head, cfg.get('auxiliary_head')):
        if head is not None:
            head.loss_decode.class_weight = torch.linspace(0.5, 2, head.num_classes).tolist()
            head.norm_cfg = dict(type='BN')
            head.dropout_ratio = 0.1
            if not feature:
                head.type = head.pop('base', head.type.removeprefix('Feature'))
    cfg.backbone.norm_cfg = dict(type='LN' if 'mit' in name else 'BN')
    torch.manual_seed(0)
    model = MODELS.build(cfg)
    model.init_weights()
    return model.train()


def train_batch(classes, images=2):
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randint(0, 256, (images, 3, 64, 64), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, classes, (images, 1, 64, 64), generator=generator)
    labels[:, :, :9] = 255
    metainfo = dict(img_shape=(64, 64), ori_shape=(64, 64))
    samples = [SegDataSample(gt_sem_seg=PixelData(data=x), metainfo=metainfo) for x in labels]
    return dict(inputs=list(inputs), data_samples=samples)


def two_steps(model):
    optimizer = OptimWrapper(torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9))
    torch.manual_seed(4)
    logs = [model.train_step(train_batch(model.num_classes), optimizer) for _ in range(2)]
    return [{k: torch.as_tensor(v) for k, v in log.items()} for log in logs], model.state_dict()


MODEL_CONFIGS = [
    'segformer/segformer_mit-b0-small-combined_1xb8-2k_camvid-240x180.py',
    'deeplabv3/deeplabv3_r18-d8-small-combined_1xb8-2k_camvid-240x180.py',
]


@pytest.mark.parametrize('name', MODEL_CONFIGS)
def test_two_training_steps_of_a_whole_model(name):
    plain, feature = (small_model(name, feature) for feature in (False, True))
    assert isinstance(feature.decode_head, heads.LowResolutionLogitHead)
    assert not isinstance(plain.decode_head, heads.LowResolutionLogitHead)
    if feature.with_auxiliary_head:
        assert isinstance(feature.auxiliary_head, heads.LowResolutionLogitHead)
        assert not isinstance(plain.auxiliary_head, heads.LowResolutionLogitHead)
    (plain_logs, plain_weights), (logs, weights) = two_steps(plain), two_steps(feature)
    for plain_log, log in zip(plain_logs, logs, strict=True):
        assert_same(plain_log, log, rtol=1e-5, atol=1e-5)
    assert_same(plain_weights, weights, rtol=1e-4, atol=1e-5)


def test_mmengines_activation_checkpointing_of_a_whole_model():
    logs = []
    for feature in (False, True):
        model = small_model(MODEL_CONFIGS[0], feature)
        turn_on_activation_checkpointing(model, ['backbone', 'decode_head'])
        with pytest.MonkeyPatch.context() as patch:
            # MMEngine leaves the variant to torch, whose default changed
            patch.setattr(
                'mmengine.runner.activation_checkpointing.checkpoint',
                lambda *args: checkpoint(*args, use_reentrant=False),
            )
            logs.append(two_steps(model)[0])
    assert_same(logs[0][1], logs[1][1], rtol=1e-5, atol=1e-5)


def test_a_cascade_of_feature_heads():
    logs = []
    backbone = dict(type='ResNetV1c', depth=18, stem_channels=8, base_channels=8)
    backbone |= dict(strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4))
    for feature in (False, True):
        first = config('FCNHead', dict(type=SpyLoss), in_channels=32, in_index=2)
        second = config('OCRHead', [COMBINED, THEIRS], in_channels=64, in_index=3)
        own = [featured('FCNHead'), featured('OCRHead')] if feature else [{}, {}]
        torch.manual_seed(0)
        model = MODELS.build(
            dict(
                type='CascadeEncoderDecoder',
                num_stages=2,
                data_preprocessor=dict(type='mmseg.SegDataPreProcessor', size=(64, 64)),
                backbone=backbone,
                decode_head=[first | own[0], second | own[1]],
            )
        )
        model.init_weights()
        logs.append(two_steps(model.train()))
        if feature:
            assert model.decode_head[0].loss_decode.seen[1] is not None
            assert model.decode_head[0].features is None  # though its forward runs once more
    assert_same(logs[0][0][1], logs[1][0][1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('type', [*NAMED, 'FCNHead', 'UPerHead'])
def test_a_head_can_be_pickled_whole(type, tmp_path):
    head = ours(type, COMBINED)
    torch.save(head, tmp_path / 'head.pth')
    again = torch.load(tmp_path / 'head.pth', weights_only=False)
    assert again.__class__ is head.__class__


def test_a_head_with_a_name_of_its_own_keeps_it():
    options = config('ASPPHead', COMBINED)
    assert type(heads.FeatureHead(base=options.pop('type'), **options)) is heads.FeatureASPPHead
    with pytest.raises(AttributeError, match='FeatureNoHead'):
        heads.FeatureNoHead  # noqa: B018
