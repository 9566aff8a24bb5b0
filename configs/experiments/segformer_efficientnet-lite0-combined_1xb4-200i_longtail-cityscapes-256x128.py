_base_ = './segformer_efficientnet-lite0_1xb4-200i_longtail-cityscapes-256x128.py'

model = dict(
    decode_head=dict(loss_decode=dict(_delete_=True, type='CombinedWeightedLoss', class_weight='auto'))
)
custom_hooks = [dict(type='ClassWeightHook')]
