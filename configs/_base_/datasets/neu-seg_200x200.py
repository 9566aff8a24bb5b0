# NEU steel surface defects, 4 classes, 200x200
# images/SPLIT/NAME.jpg and annotations/SPLIT/NAME.png, 255 = ignored
_base_ = './camvid_240x180.py'

dataset_type = 'BaseSegDataset'
data_root = 'data/neu_seg/'
# fmt: off
classes = (
    'background', 'inclusion', 'patches', 'scratches',
)
# fmt: on
crop_size = (200, 200)  # height, width
scale = (200, 200)  # width, height
train_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='LoadAnnotations'),
    dict(type='RandomResize', scale=scale, ratio_range=(1.0, 1.5), keep_ratio=True),
    dict(type='RandomCrop', crop_size=crop_size, cat_max_ratio=1.0),
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
    dataset=dict(
        type=dataset_type,
        data_root=data_root,
        metainfo=dict(classes=classes),
        pipeline=train_pipeline,
    ),
)
val_dataloader = dict(
    dataset=dict(
        type=dataset_type,
        data_root=data_root,
        metainfo=dict(classes=classes),
        pipeline=test_pipeline,
    ),
)
test_dataloader = val_dataloader
val_evaluator = dict(blocks=None)  # photos, no video
test_evaluator = val_evaluator
