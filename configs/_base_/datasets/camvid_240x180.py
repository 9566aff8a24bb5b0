# CamVid, 480x360, 11 classes: images/SPLIT/NAME.jpg and annotations/SPLIT/NAME.png, 11 = unlabelled
custom_imports = dict(imports=['mmseg_imbalance'], allow_failed_imports=False)

dataset_type = 'CamVidDataset'
data_root = 'data/camvid/'
crop_size = (180, 240)  # height, width
scale = (240, 180)  # width, height
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='RandomResize', scale=scale, ratio_range=(1.0, 1.5), keep_ratio=True),
    dict(type='RandomCrop', crop_size=crop_size, cat_max_ratio=0.75),
    dict(type='RandomFlip', prob=0.5),
    dict(type='PackSegInputs'),
]
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=scale, keep_ratio=True),
    # labels keep their size: predictions are resized to them
    dict(type='LoadAnnotations'),
    dict(type='PackSegInputs'),
]
train_dataloader = dict(
    batch_size=8,
    num_workers=2,
    persistent_workers=True,
    sampler=dict(type='InfiniteSampler', shuffle=True),
    dataset=dict(
        type=dataset_type,
        data_root=data_root,
        data_prefix=dict(img_path='images/train', seg_map_path='annotations/train'),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    batch_size=1,
    num_workers=2,
    persistent_workers=True,
    sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(
        type=dataset_type,
        data_root=data_root,
        data_prefix=dict(img_path='images/val', seg_map_path='annotations/val'),
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
# val is 7 s of one video: intervals are over pieces of 20 frames, as single frames are not independent
val_evaluator = dict(type='ImbalanceIoUMetric', blocks=20)
test_evaluator = val_evaluator
custom_hooks = [dict(type='RunHook')]
