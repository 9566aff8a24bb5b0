# All defects as one class against the background. Half the resolution, a quarter of the width, for a CPU.
_base_ = [
    '../_base_/models/fcn_resunet_s5-d16_binary.py',
    '../_base_/datasets/magnetic-tile_240x180.py',
    'mmseg::_base_/default_runtime.py',
    '../_base_/schedules/schedule_2k_bfloat16.py',
]

custom_hooks = [dict(type='ClassWeightHook', scheme='inverse_freq')]
width = 16
# Half of the images hold no defect. Tversky of each image alone ends at a prediction without one, so the sums
# are those of the batch, and cross-entropy stands beside them.
loss = dict(type='CombinedWeightedLoss', region='tversky', region_reduction='batch')
# GroupNorm of so few channels makes all images alike, with a defect or without
norm_cfg = dict(_delete_=True, type='BN')
model = dict(
    data_preprocessor=dict(size=_base_.crop_size),
    backbone=dict(base_channels=width, stem_stride=2, norm_cfg=norm_cfg),
    decode_head=dict(in_channels=width, channels=width, norm_cfg=norm_cfg, loss_decode=loss),
    auxiliary_head=[
        dict(
            head,
            in_channels=head['in_channels'] // 4,
            channels=width,
            norm_cfg=dict(type='BN'),
            loss_decode=dict(head['loss_decode'], **loss),
        )
        for head in _base_.model.auxiliary_head
    ],
)
defects = dict(
    type='MergedClassDataset',
    classes_of_labels=['background', *['defect'] * 5],
    metainfo=dict(classes=('background', 'defect')),
)
train_dataloader = dict(dataset=defects)
val_dataloader = dict(dataset=defects)
test_dataloader = val_dataloader
