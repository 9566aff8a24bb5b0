_base_ = './schedule_2k.py'

# two thirds of the time on a CPU with AMX; bfloat16 has the range of float32 and needs no loss scale
optim_wrapper = dict(type='AmpOptimWrapper', dtype='bfloat16', loss_scale=1.0)
