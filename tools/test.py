"""Test a segmentor on GPUs or CPU, with the options of MMSegmentation's own script and four more.

The metrics are printed, and written as JSON into a folder of the work dir.
"""

import argparse
from pathlib import Path

from launch import build_runner, parser, read_config
from mmengine.dist import is_main_process
from mmengine.hooks import LoggerHook

from mmseg_imbalance.decisions import RULES, mend_merged_threshold


def pixels(text):
    """A positive number of pixels."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'must be a whole number of pixels, at least 1, got {text!r}')
    return int(text)


def main(argv=None):
    options = parser(__doc__, 'CONFIG work_dirs/run/iter_2000.pth --work-dir work_dirs/run/test')
    options.add_argument('checkpoint', help='checkpoint file')
    options.add_argument('--out', help='folder for predicted label maps')
    options.add_argument('--show', action='store_true', help='show predictions in a window')
    options.add_argument('--show-dir', help='folder for painted predictions')
    options.add_argument('--wait-time', type=float, default=2, help='seconds that --show waits')
    options.add_argument('--tta', action='store_true', help='test time augmentation')
    options.add_argument(
        '--logit-adjustment',
        type=float,
        metavar='TAU',
        help='subtract TAU * ln(share of the class in the training data) from the logits; counts are cached',
    )
    options.add_argument(
        '--decide',
        choices=RULES,
        default='argmax',
        help='the most probable class of each pixel, or the pixels of each class with the highest expected '
        'IoU or Dice in the image (RankSEG); default %(default)s',
    )
    options.add_argument(
        '--remove-small',
        type=pixels,
        default=1,
        metavar='AREA',
        help='give connected components of fewer pixels, of the label size, to the class around them',
    )
    options.add_argument(
        '--save-predictions',
        action='store_true',
        help='save predictions and truth beside the log: mmseg-imbalance compare shows them in pictures',
    )
    args = options.parse_args(argv)

    cfg = read_config(args)
    cfg.load_from = args.checkpoint
    if args.show or args.show_dir:
        if 'visualization' not in cfg.default_hooks:
            options.error("--show needs dict(type='SegVisualizationHook') among the default_hooks")
        cfg.default_hooks.visualization.update(draw=True, show=args.show, wait_time=args.wait_time)
        if args.show_dir:
            cfg.visualizer.save_dir = args.show_dir
    hooks = list(cfg.get('custom_hooks') or ())
    if args.logit_adjustment is not None:
        hooks.append(dict(type='LogitAdjustmentHook', tau=args.logit_adjustment))
    if args.decide != 'argmax' or args.remove_small > 1:
        hooks.append(dict(type='DecisionHook', rule=args.decide, remove_small=args.remove_small))
    if args.save_predictions:
        hooks.append(dict(type='PredictionHook'))
    cfg.custom_hooks = hooks
    if args.tta:
        if missing := [name for name in ('tta_model', 'tta_pipeline') if cfg.get(name) is None]:
            options.error(f"--tta needs {' and '.join(missing)} in the config, as MMSegmentation's have them")
        cfg.test_dataloader.dataset.pipeline = cfg.tta_pipeline
        cfg.tta_model.module = cfg.model
        cfg.model = cfg.tta_model
    if args.out:
        # MMSegmentation's metric makes it on rank 0 alone, and the other ranks do not wait for that
        Path(args.out).mkdir(parents=True, exist_ok=True)
        cfg.test_evaluator.update(output_dir=args.out, keep_results=True)
    runner = build_runner(cfg)
    mend_merged_threshold(runner.model)
    if not is_main_process():
        for hook in runner.hooks:
            if isinstance(hook, LoggerHook):
                # MMEngine's writes the results on every rank, into the same file at the same time
                hook.after_test_epoch = lambda *_, **__: None
    runner.test()


if __name__ == '__main__':
    main()
