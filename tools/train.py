"""Train a segmentor on GPUs or CPU, with the options of MMSegmentation's own script.

The log, the checkpoints and what the hooks write go into the work dir.
"""

from launch import build_runner, parser, read_config

from mmseg_imbalance.config_fields import type_name


def main(argv=None):
    options = parser(__doc__, 'CONFIG --work-dir work_dirs/run --cfg-options randomness.seed=0')
    options.add_argument('--resume', action='store_true', help='from the latest checkpoint in the work_dir')
    options.add_argument('--amp', action='store_true', help='mixed precision, float16 or on CPU bfloat16')
    args = options.parse_args(argv)

    cfg = read_config(args)
    if args.amp and (kind := type_name(cfg.optim_wrapper)) != 'AmpOptimWrapper':
        if kind not in ('', 'OptimWrapper'):  # without a type it is one
            options.error(f'--amp replaces OptimWrapper, but the config has {kind}')
        cfg.optim_wrapper.type = 'AmpOptimWrapper'
        cfg.optim_wrapper.loss_scale = 'dynamic'
    cfg.resume = args.resume
    build_runner(cfg).train()


if __name__ == '__main__':
    main()
