_base_ = './deeplabv3_r18-d8-small_1xb8-2k_camvid-240x180.py'

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
