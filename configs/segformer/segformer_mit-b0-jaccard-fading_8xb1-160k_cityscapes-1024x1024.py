_base_ = './segformer_mit-b0-combined_8xb1-160k_cityscapes-1024x1024.py'

# for training to the end, see docs/what-helps.md; full weights up to a quarter, none from three quarters on
model = dict(
    decode_head=dict(
        loss_decode=dict(
            region='jaccard',
            ce_weight=0.25,
            dice_weight=0.75,
            region_reduction='batch',
            absent_classes='ignore',
        ),
    ),
)
custom_hooks = [dict(type='ClassWeightHook', power_schedule=[(0.25, 1.0), (0.75, 0.0)])]
