_base_ = './segformer_mit-b0-small-combined_1xb8-2k_longtail-cityscapes-256x128.py'

model = dict(
    decode_head=dict(
        loss_decode=[
            dict(type='CombinedWeightedLoss', class_weight='auto', loss_weight=0.8),
            dict(type='SimilaritySubclassifiedLoss', class_weight='auto', loss_weight=0.2),
        ],
    ),
)
custom_hooks = [dict(type='ClassWeightHook'), dict(type='SubclassVisualizationHook')]
