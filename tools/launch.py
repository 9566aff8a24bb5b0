"""What train.py and test.py have in common: options, reading a config."""

import argparse
import os
from pathlib import Path

from mmengine.config import Config, DictAction
from mmengine.runner import Runner
from mmseg.registry import RUNNERS

# importing it registers the package, and where MMEngine finds MMSegmentation's configs for mmseg:: bases
from mmseg_imbalance.compat import adapt_to_cpu


def config_file(text: str) -> str:
    """The path of a config, which exists."""
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f'{text} is no file')
    return text


def parser(description: str, example: str) -> argparse.ArgumentParser:
    """MMSegmentation's options of training and testing; ``example`` is a command line without the command."""
    parser = argparse.ArgumentParser(
        description=description,
        epilog=f'example:\n  %(prog)s {example}',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('config', type=config_file, help='config file')
    parser.add_argument('--work-dir', help='folder of logs and results; default work_dirs/CONFIG')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        metavar='KEY=VALUE',
        help='override settings of the config, as in model.backbone.depth=18 or key="[a,b]"',
    )
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none')
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)
    return parser


def read_config(args: argparse.Namespace) -> Config:
    """The config with the command line's changes in it."""
    cfg = Config.fromfile(args.config)
    if args.cfg_options:
        cfg.merge_from_dict(args.cfg_options)
    cfg.launcher = args.launcher
    cfg.work_dir = args.work_dir or cfg.get('work_dir') or str(Path('work_dirs', Path(args.config).stem))
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    return cfg


def build_runner(cfg: Config):
    """The runner of a config, on whatever devices there are."""
    adapt_to_cpu(cfg)
    return RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)
