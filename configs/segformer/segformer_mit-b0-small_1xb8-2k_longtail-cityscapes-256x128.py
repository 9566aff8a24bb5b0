_base_ = [
    '../_base_/models/segformer_mit-b0-small.py',
    '../_base_/datasets/longtail-cityscapes_256x128.py',
    'mmseg::_base_/default_runtime.py',
    '../_base_/schedules/schedule_2k.py',
]

model = dict(
    data_preprocessor=dict(size=(128, 256)),
    decode_head=dict(num_classes=19),
)
