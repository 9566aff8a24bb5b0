# Vessels of the retina against the background
_base_ = [
    '../_base_/models/fcn_resunet_s5-d16_binary.py',
    'mmseg::_base_/datasets/chase_db1.py',
    'mmseg::_base_/default_runtime.py',
    'mmseg::_base_/schedules/schedule_40k.py',
]

custom_imports = dict(imports=['mmseg_imbalance'], allow_failed_imports=False)
custom_hooks = [dict(type='ClassWeightHook')]
crop_size = (128, 128)
model = dict(
    data_preprocessor=dict(size=crop_size),
    test_cfg=dict(mode='slide', crop_size=crop_size, stride=(85, 85)),
)
val_evaluator = dict(type='ImbalanceIoUMetric', iou_metrics=['mIoU', 'mDice'])
test_evaluator = val_evaluator
