_base_ = [
    '../_base_/models/deeplabv3_r18-d8-small.py',
    '../_base_/datasets/camvid_240x180.py',
    'mmseg::_base_/default_runtime.py',
    '../_base_/schedules/schedule_2k.py',
]

model = dict(
    data_preprocessor=dict(size=(180, 240)),
    decode_head=dict(num_classes=11),
    auxiliary_head=dict(num_classes=11),
)
