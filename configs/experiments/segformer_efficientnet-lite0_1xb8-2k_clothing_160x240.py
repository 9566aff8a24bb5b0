_base_ = [
    '../_base_/datasets/clothing_160x240.py',
    'mmseg::_base_/default_runtime.py',
    '../_base_/schedules/schedule_2k_bfloat16.py',
    '../_base_/models/segformer_efficientnet-lite0.py',
]

model = dict(
    data_preprocessor=dict(size=(240, 160)),
    decode_head=dict(num_classes=42),
)
