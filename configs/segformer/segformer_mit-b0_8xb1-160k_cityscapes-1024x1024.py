_base_ = 'mmseg::segformer/segformer_mit-b0_8xb1-160k_cityscapes-1024x1024.py'

custom_imports = dict(imports=['mmseg_imbalance'], allow_failed_imports=False)
val_evaluator = dict(type='ImbalanceIoUMetric')
test_evaluator = val_evaluator
custom_hooks = [dict(type='RunHook')]
