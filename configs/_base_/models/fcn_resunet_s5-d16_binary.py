# ResUNet for an object against the background, with one output channel. GroupNorm takes batches of any size.
# Deep supervision: focal Tversky on every level of the decoder.
norm_cfg = dict(type='GN', num_groups=8)
model = dict(
    type='EncoderDecoder',
    data_preprocessor=dict(
        type='SegDataPreProcessor',
        mean=[123.675, 116.28, 103.53],
        std=[58.395, 57.12, 57.375],
        bgr_to_rgb=True,
        pad_val=0,
        seg_pad_val=255,
    ),
    backbone=dict(type='ResUNet', base_channels=64, num_stages=5, norm_cfg=norm_cfg),
    train_cfg=dict(),
    test_cfg=dict(mode='whole'),
)
heads = [
    dict(
        type='FeatureHead',
        base='FCNHead',
        in_channels=in_channels,
        in_index=in_index,
        channels=64,
        num_convs=1,
        concat_input=False,
        dropout_ratio=0.1,
        num_classes=2,
        out_channels=1,
        threshold=0.5,
        norm_cfg=norm_cfg,
        align_corners=False,
        loss_decode=dict(
            type='WeightedTverskyLoss',
            class_weight='auto',
            alpha=0.3,
            beta=0.7,
            gamma=0.75,
            loss_weight=loss_weight,
        ),
    )
    for in_index, in_channels, loss_weight in ((4, 64, 1.0), (3, 128, 0.4), (2, 256, 0.2), (1, 512, 0.1))
]
model.update(decode_head=heads[0], auxiliary_head=heads[1:])
