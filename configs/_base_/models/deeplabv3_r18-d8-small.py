# DeepLabV3 R18 at a quarter of the width, from scratch: trains on a CPU
_base_ = 'mmseg::_base_/models/deeplabv3_r50-d8.py'

model = dict(
    pretrained=None,
    backbone=dict(depth=18, stem_channels=16, base_channels=16),
    decode_head=dict(in_channels=128, channels=64, dilations=(1, 3, 6, 9), dropout_ratio=0.0),
    auxiliary_head=dict(in_channels=64, channels=32, dropout_ratio=0.0),
)
