_base_ = './deeplabv3_r50-d8-combined_4xb2-40k_cityscapes-512x1024.py'

# for training to the end, see docs/what-helps.md: full weights up to a quarter of it, none after three quarters
custom_hooks = [dict(type='ClassWeightHook', power_schedule=[(0.25, 1.0), (0.75, 0.0)])]
