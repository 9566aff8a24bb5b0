_base_ = './deeplabv3_r50-d8_4xb2-40k_cityscapes-512x1024.py'

model = dict(
    decode_head=dict(
        type='FeatureASPPHead',
        loss_decode=dict(_delete_=True, type='CombinedWeightedLoss', class_weight='auto'),
    ),
    auxiliary_head=dict(
        type='FeatureHead',
        base='FCNHead',
        loss_decode=dict(_delete_=True, type='CombinedWeightedLoss', class_weight='auto', loss_weight=0.4),
    ),
)
custom_hooks = [dict(type='ClassWeightHook')]
