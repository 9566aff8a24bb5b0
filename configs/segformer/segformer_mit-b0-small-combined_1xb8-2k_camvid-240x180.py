_base_ = './segformer_mit-b0-small_1xb8-2k_camvid-240x180.py'

model = dict(
    decode_head=dict(
        type='FeatureSegformerHead',
        loss_decode=dict(_delete_=True, type='CombinedWeightedLoss', class_weight='auto'),
    ),
)
custom_hooks = [dict(type='ClassWeightHook')]
