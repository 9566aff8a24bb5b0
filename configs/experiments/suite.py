"""What helps, on four data sets: ``mmseg-imbalance suite configs/experiments/suite.py --data DIR``."""

datasets = dict(
    camvid='{{ fileDirname }}/segformer_efficientnet-lite0_1xb8-2k_camvid-240x180.py',
    clothing='{{ fileDirname }}/segformer_efficientnet-lite0_1xb8-2k_clothing_160x240.py',
    magnetic_tile='{{ fileDirname }}/segformer_efficientnet-lite0_1xb8-2k_magnetic-tile_240x180.py',
    neu_seg='{{ fileDirname }}/segformer_efficientnet-lite0_1xb8-2k_neu-seg_200x200.py',
)
# iterations of training; with 4000, cross-entropy no longer rises in the last 1000 on CamVid
schedules = dict(short=500, long=2000, converged=4000)


def loss(type='CombinedWeightedLoss', sampler=False, hook=None, **options):
    """The lines in which a method differs from plain cross-entropy."""
    changed = dict(
        model=dict(decode_head=dict(loss_decode=dict(_delete_=True, type=type, **options))),
        custom_hooks=[dict(type='ClassWeightHook', **(hook or {}))],
    )
    if sampler:
        rule = {} if sampler is True else sampler
        changed['train_dataloader'] = dict(sampler=dict(_delete_=True, type='RareClassSampler', **rule))
        changed['custom_hooks'] += [dict(type='ResumeSamplerHook')]
    return changed


def subclassified(type, **options):
    """A fifth of the default loss is one that looks inside the classes."""
    auto = dict(class_weight='auto')
    losses = [
        dict(type='CombinedWeightedLoss', **auto, loss_weight=0.8),
        dict(type=type, **auto, loss_weight=0.2, **options),
    ]
    return dict(model=dict(decode_head=dict(loss_decode=losses)), custom_hooks=[dict(type='ClassWeightHook')])


CE, FOCAL, DICE = 'WeightedCrossEntropyLoss', 'WeightedFocalLoss', 'WeightedDiceLoss'
AUTO = dict(class_weight='auto')
JACCARD = dict(
    region='jaccard', ce_weight=0.25, dice_weight=0.75, region_reduction='batch', absent_classes='ignore'
)
methods = {
    'cross-entropy': dict(),
    'CE, sqrt_inv_freq': loss(CE, **AUTO),
    'CE, inverse_freq': loss(CE, **AUTO, hook=dict(scheme='inverse_freq')),
    'CE, recall': loss('RecallWeightedLoss'),
    'CE, running recall': loss('RecallWeightedLoss', momentum=0.1),
    'focal': loss(FOCAL),
    'Dice': loss(DICE, **AUTO),
    'combined, auto': loss(**AUTO),
    'combined': loss(),
    'combined, auto, Dice without weights': loss(**AUTO, region_class_weight=None),
    'combined, auto, Dice without weights and background': loss(
        **AUTO, region_class_weight=dict(background=0.0)
    ),
    'combined, auto, present': loss(**AUTO, absent_classes='ignore'),
    'combined, auto, batch': loss(**AUTO, region_reduction='batch'),
    'combined, auto, uncertainty': loss(**AUTO, balance='uncertainty'),
    'combined, auto, gradnorm': loss(**AUTO, balance='gradnorm'),
    'combined, auto, Dice 0.9': loss(**AUTO, ce_weight=0.1, dice_weight=0.9),
    'combined, auto, clusters': subclassified(
        'SubclassifiedLoss', num_subclasses=2, warmup_iters=200, ramp_iters=200
    ),
    'combined, auto, similarity': subclassified('SimilaritySubclassifiedLoss'),
    'combined, power 0.5': loss(**AUTO, hook=dict(power=0.5)),
    'combined, fading': loss(**AUTO, hook=dict(power_schedule=[(0.25, 1.0), (0.75, 0.0)])),
    'combined, deferred': loss(**AUTO, hook=dict(power_schedule=[(0.8, 0.0), (0.8, 1.0)])),
    'Jaccard': loss(**JACCARD),
    'Jaccard, power 0.5': loss(**JACCARD, **AUTO, hook=dict(power=0.5)),
    'Jaccard, fading': loss(**JACCARD, **AUTO, hook=dict(power_schedule=[(0.25, 1.0), (0.75, 0.0)])),
    'focal Tversky': loss(region='tversky', alpha=0.3, beta=0.7, gamma=0.75, **AUTO),
    'logit adjustment 0.5': loss(CE, logit_adjustment=0.5),
    'logit adjustment 1': loss(CE, logit_adjustment=1.0),
    'logit variation': loss(CE, logit_variation=4.0),
    'hardness': loss('HardnessWeightedLoss'),
    'skeleton recall': dict(loss('SkeletonRecallLoss'), augment=[dict(type='SkeletonTubes')]),
    'CE, paste': dict(augment=[dict(type='RareClassPaste')]),
    'combined, auto, paste': dict(loss(**AUTO), augment=[dict(type='RareClassPaste')]),
    'CE, rare class sampling': loss(CE, sampler=True),
    'CE, repeat factor sampling': loss(CE, sampler=dict(rule='repeat_factor', threshold=1.0)),
    'Jaccard, rare class sampling': loss(**JACCARD, sampler=True),
    # mmseg-imbalance fit-bias on the models of these; where a checkpoint is gone, its training comes first
    'cross-entropy, bias': dict(fit_bias='cross-entropy'),
    'combined, auto, bias': dict(fit_bias='combined, auto'),
    'combined, fading, bias': dict(fit_bias='combined, fading'),
}
LAST = ['cross-entropy', 'combined, auto', 'combined, fading']
LAST += [f'{method}, bias' for method in LAST]
RECOMMENDED = ['Jaccard, fading']
# of data that have one, which CamVid has not; the second tells what its weights do
WITH_BACKGROUND = [
    'combined, auto, Dice without weights and background',
    'combined, auto, Dice without weights',
]
# in the order of what they decide
runs = [
    dict(dataset='camvid', schedule='converged', seeds=5, methods=LAST + RECOMMENDED),
    *(
        dict(dataset=dataset, schedule='long', seeds=3, methods=LAST + RECOMMENDED + WITH_BACKGROUND)
        for dataset in ('clothing', 'neu_seg', 'magnetic_tile')
    ),
    dict(
        dataset='camvid',
        schedule='short',
        seeds=5,
        methods=[method for method in methods if method != WITH_BACKGROUND[0]],
    ),
    dict(
        dataset='camvid',
        schedule='long',
        seeds=5,
        methods=LAST + RECOMMENDED + ['combined, auto, clusters', 'combined, auto, similarity'],
    ),
    dict(
        dataset='camvid',
        schedule='converged',
        seeds=3,
        methods=[
            'CE, sqrt_inv_freq',
            'combined',
            'combined, auto, present',
            'combined, auto, batch',
            'combined, deferred',
            'Jaccard, power 0.5',
            'CE, rare class sampling',
            'hardness',
            'CE, recall',
        ],
    ),
]
