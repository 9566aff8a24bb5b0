_base_ = './segformer_mit-b0_8xb1-160k_cityscapes-1024x1024.py'

model = dict(
    decode_head=dict(
        type='FeatureSegformerHead',
        loss_decode=dict(_delete_=True, type='HardnessWeightedLoss'),
    ),
)
