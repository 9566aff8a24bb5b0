# Clothing Co-Parsing (Yang, Luo, Lin, CVPR 2014) with the 42 classes of at least 20 photos
# images/SPLIT/NAME.jpg and annotations/SPLIT/NAME.png, 255 = ignored
_base_ = './camvid_240x180.py'

dataset_type = 'BaseSegDataset'
data_root = 'data/clothing/'
# fmt: off
classes = (
    'background', 'accessories', 'bag', 'belt', 'blazer', 'blouse', 'boots', 'bracelet', 'cape',
    'coat', 'dress', 'glasses', 'hair', 'hat', 'jacket', 'jeans', 'jumper', 'leggings', 'loafers',
    'necklace', 'pants', 'purse', 'romper', 'sandals', 'scarf', 'shirt', 'shoes', 'shorts', 'skin',
    'skirt', 'socks', 'stockings', 'suit', 'sunglasses', 'sweater', 'sweatshirt', 't-shirt', 'tie',
    'top', 'vest', 'wallet', 'watch',
)
# fmt: on
crop_size = (240, 160)  # height, width
scale = (160, 240)  # width, height
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
