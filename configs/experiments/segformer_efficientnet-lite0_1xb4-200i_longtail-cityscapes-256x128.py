# What `mmseg-imbalance demo` trains. float32, as bfloat16 is slow on a CPU without instructions for it.
_base_ = [
    '../_base_/models/segformer_efficientnet-lite0.py',
    '../_base_/datasets/longtail-cityscapes_256x128.py',
    'mmseg::_base_/default_runtime.py',
    '../_base_/schedules/schedule_2k.py',
]

model = dict(
    data_preprocessor=dict(size=(128, 256)),
    # so few iterations do not move the running statistics from those of ImageNet
    backbone=dict(norm_eval=True),
    decode_head=dict(num_classes=19),
)
optim_wrapper = dict(paramwise_cfg=dict(custom_keys=dict(decode_head=dict(lr_mult=10.0))))
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=False, begin=0, end=20),
    dict(type='PolyLR', eta_min=0.0, power=1.0, by_epoch=False, begin=20, end=200),
]
train_cfg = dict(max_iters=200, val_interval=200)
train_dataloader = dict(batch_size=4)
