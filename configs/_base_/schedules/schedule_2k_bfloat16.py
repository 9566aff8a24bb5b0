_base_ = './schedule_2k.py'

# two thirds of the time on a CPU with AMX or AVX-512 BF16; the range is float32's, so no loss scale is needed
optim_wrapper = dict(type='AmpOptimWrapper', dtype='bfloat16', loss_scale=1.0)
