# All defects as one class against the background. Half the resolution, a quarter of the width, for a CPU.
_base_ = [
    '../_base_/models/fcn_resunet_s5-d16_binary.py',
    '../_base_/datasets/magnetic-tile_240x180.py',
    'mmseg::_base_/default_runtime.py',
    '../_base_/schedules/schedule_2k_bfloat16.py',
]

custom_hooks = [dict(type='ClassWeightHook')]
width = 16
model = dict(
    data_preprocessor=dict(size=_base_.crop_size),
    backbone=dict(base_channels=width, stem_stride=2),
    decode_head=dict(in_channels=width, channels=width),
    auxiliary_head=[
        dict(head, in_channels=head['in_channels'] // 4, channels=width)
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
