_base_ = './segformer_mit-b0-small_1xb8-2k_longtail-cityscapes-256x128.py'

model = dict(
    decode_head=dict(
        type='FeatureSegformerHead',
        loss_decode=dict(_delete_=True, type='CombinedWeightedLoss', class_weight='auto'),
    ),
)
custom_hooks = [dict(type='ClassWeightHook')]
