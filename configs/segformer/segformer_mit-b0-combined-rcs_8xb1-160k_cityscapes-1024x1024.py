_base_ = './segformer_mit-b0-combined_8xb1-160k_cityscapes-1024x1024.py'

# DAFormer's numbers: no uniform draws; pixels of a 2048x1024 annotation, and half of them in a crop. A resize
# by 0.5 to 2 comes in between: below 0.71, 3000 become less than 1500, but then most of the image is in the
# crop anyway.
train_pipeline = [
    dict(step, type='RareClassCrop', min_pixels=1500) if step['type'] == 'RandomCrop' else step
    for step in _base_.train_pipeline
]
train_dataloader = dict(
    sampler=dict(_delete_=True, type='RareClassSampler', uniform=0, min_pixels=3000),
    dataset=dict(pipeline=train_pipeline),
)
custom_hooks = [*_base_.custom_hooks, dict(type='ResumeSamplerHook')]
