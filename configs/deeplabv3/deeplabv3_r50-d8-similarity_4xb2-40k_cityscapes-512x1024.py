_base_ = './deeplabv3_r50-d8-combined_4xb2-40k_cityscapes-512x1024.py'

model = dict(
    decode_head=dict(
        loss_decode=[
            dict(type='CombinedWeightedLoss', class_weight='auto', loss_weight=0.8),
            dict(type='SimilaritySubclassifiedLoss', class_weight='auto', loss_weight=0.2),
        ],
    ),
)
custom_hooks = [dict(type='ClassWeightHook'), dict(type='SubclassVisualizationHook')]
