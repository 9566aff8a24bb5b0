# SegFormer B0 at half the width and depth, from scratch: trains on a CPU
_base_ = 'mmseg::_base_/models/segformer_mit-b0.py'

model = dict(
    backbone=dict(embed_dims=16, num_layers=[1, 1, 1, 1], drop_path_rate=0.0),
    decode_head=dict(in_channels=[16, 32, 80, 128], channels=64, dropout_ratio=0.0),
)
