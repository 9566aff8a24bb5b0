# Aerial images of 1024x1024, tested in overlapping windows of the training's size. A test gives regions of
# fewer than 100 pixels, 9 square metres at 0.3 m a pixel, to the class around them.
_base_ = [
    'mmseg::_base_/models/fcn_unet_s5-d16.py',
    'mmseg::_base_/datasets/loveda.py',
    'mmseg::_base_/default_runtime.py',
    'mmseg::_base_/schedules/schedule_80k.py',
]

custom_imports = dict(imports=['mmseg_imbalance'], allow_failed_imports=False)
custom_hooks = [dict(type='ClassWeightHook'), dict(type='DecisionHook', remove_small=100)]
crop_size = (512, 512)
head = dict(type='FeatureHead', base='FCNHead', num_classes=7)
loss = dict(_delete_=True, type='CombinedWeightedLoss', class_weight='auto')
model = dict(
    data_preprocessor=dict(size=crop_size),
    backbone=dict(_delete_=True, type='ResUNet', norm_cfg=dict(type='SyncBN')),
    decode_head=dict(loss_decode=loss, **head),
    auxiliary_head=dict(loss_decode=dict(loss_weight=0.4, **loss), **head),
    test_cfg=dict(mode='slide', crop_size=crop_size, stride=(341, 341)),
)
val_evaluator = dict(type='ImbalanceIoUMetric')
test_evaluator = val_evaluator
