_base_ = './segformer_mit-b0-combined_8xb1-160k_cityscapes-1024x1024.py'

model = dict(
    decode_head=dict(
        loss_decode=[
            dict(type='CombinedWeightedLoss', class_weight='auto', loss_weight=0.8),
            dict(type='SimilaritySubclassifiedLoss', class_weight='auto', loss_weight=0.2),
        ],
    ),
)
custom_hooks = [dict(type='ClassWeightHook'), dict(type='SubclassVisualizationHook')]
