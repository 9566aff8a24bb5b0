_base_ = './segformer_mit-b0-small-combined_1xb8-2k_camvid-240x180.py'

# Trained the same, so checkpoints are interchangeable; validated and tested on images half as large again,
# still within the resize of the training, in overlapping windows of the training's size.
model = dict(test_cfg=dict(mode='slide', crop_size=_base_.crop_size, stride=(120, 160)))
test_pipeline = [
    dict(step, scale=(360, 270)) if step['type'] == 'Resize' else step for step in _base_.test_pipeline
]
val_dataloader = dict(dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
