# U-Net under deep supervision: the decoder's coarser outputs have heads, and the same loss, of their own
_base_ = 'mmseg::unet/unet-s5-d16_fcn_4xb4-160k_cityscapes-512x1024.py'

custom_imports = dict(imports=['mmseg_imbalance'], allow_failed_imports=False)
custom_hooks = [dict(type='ClassWeightHook')]
focal_tversky = dict(type='WeightedTverskyLoss', class_weight='auto', alpha=0.3, beta=0.7, gamma=0.75)
model = dict(
    decode_head=dict(type='FeatureHead', base='FCNHead', loss_decode=dict(_delete_=True, **focal_tversky)),
    auxiliary_head=[
        dict(
            type='FeatureHead',
            base='FCNHead',
            in_channels=in_channels,
            in_index=in_index,
            channels=64,
            num_convs=1,
            concat_input=False,
            dropout_ratio=0.1,
            num_classes=19,
            norm_cfg=dict(type='SyncBN', requires_grad=True),
            align_corners=False,
            loss_decode=dict(loss_weight=loss_weight, **focal_tversky),
        )
        for in_index, in_channels, loss_weight in ((3, 128, 0.4), (2, 256, 0.2), (1, 512, 0.1))
    ],
)
val_evaluator = dict(type='ImbalanceIoUMetric')
test_evaluator = val_evaluator
