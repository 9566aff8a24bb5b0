# a number for each class: more for what looks most different near and far, none for the sky
_base_ = './segformer_mit-b0-combined_8xb1-160k_cityscapes-1024x1024.py'

model = dict(
    decode_head=dict(
        loss_decode=[
            dict(type='CombinedWeightedLoss', class_weight='auto', loss_weight=0.8),
            dict(
                type='SubclassifiedLoss',
                num_subclasses={
                    'road': 2,
                    'sidewalk': 3,
                    'building': 3,
                    'wall': 3,
                    'fence': 3,
                    'pole': 3,
                    'traffic light': 3,
                    'traffic sign': 3,
                    'vegetation': 3,
                    'terrain': 3,
                    'sky': 1,
                    'person': 4,
                    'rider': 3,
                    'car': 5,
                    'truck': 3,
                    'bus': 3,
                    'train': 3,
                    'motorcycle': 3,
                    'bicycle': 3,
                },
                class_weight='auto',
                loss_weight=0.2,
            ),
        ],
    ),
)
custom_hooks = [dict(type='ClassWeightHook'), dict(type='SubclassVisualizationHook')]
