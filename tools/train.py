"""Train a segmentor, as MMSegmentation's tools/train.py does, on GPUs or CPU."""

from launch import build_runner, parser, read_config


def main(argv=None):
    options = parser(__doc__)
    options.add_argument('--resume', action='store_true', help='from the latest checkpoint in the work_dir')
    options.add_argument('--amp', action='store_true', help='mixed precision, float16 or on CPU bfloat16')
    args = options.parse_args(argv)

    cfg = read_config(args)
    if args.amp and cfg.optim_wrapper.type != 'AmpOptimWrapper':
        if cfg.optim_wrapper.type != 'OptimWrapper':
            options.error(f'--amp replaces OptimWrapper, but the config has {cfg.optim_wrapper.type}')
        cfg.optim_wrapper.type = 'AmpOptimWrapper'
        cfg.optim_wrapper.loss_scale = 'dynamic'
    cfg.resume = args.resume
    build_runner(cfg).train()


if __name__ == '__main__':
    main()
