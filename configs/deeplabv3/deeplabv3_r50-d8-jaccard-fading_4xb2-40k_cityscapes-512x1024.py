_base_ = './deeplabv3_r50-d8-combined_4xb2-40k_cityscapes-512x1024.py'

# for training to the end, see docs/what-helps.md; full weights up to a quarter, none from three quarters on
options = dict(
    region='jaccard', ce_weight=0.25, dice_weight=0.75, region_reduction='batch', absent_classes='ignore'
)
model = dict(decode_head=dict(loss_decode=options), auxiliary_head=dict(loss_decode=options))
custom_hooks = [dict(type='ClassWeightHook', power_schedule=[(0.25, 1.0), (0.75, 0.0)])]
