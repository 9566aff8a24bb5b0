_base_ = 'mmseg::deeplabv3/deeplabv3_r50-d8_4xb2-40k_cityscapes-512x1024.py'

custom_imports = dict(imports=['mmseg_imbalance'], allow_failed_imports=False)
val_evaluator = dict(type='ImbalanceIoUMetric')
test_evaluator = val_evaluator
custom_hooks = [dict(type='RunHook')]
