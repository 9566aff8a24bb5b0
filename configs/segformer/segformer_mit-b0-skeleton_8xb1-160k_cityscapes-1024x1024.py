_base_ = './segformer_mit-b0_8xb1-160k_cityscapes-1024x1024.py'

# fence, pole, traffic light, traffic sign, motorcycle, bicycle
tubes = dict(type='SkeletonTubes', classes=[4, 5, 6, 7, 17, 18])
train_pipeline = [*_base_.train_pipeline[:-1], tubes, _base_.train_pipeline[-1]]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
model = dict(
    decode_head=dict(
        type='FeatureSegformerHead',
        loss_decode=dict(_delete_=True, type='SkeletonRecallLoss', class_weight='auto'),
    ),
)
custom_hooks = [dict(type='ClassWeightHook')]
