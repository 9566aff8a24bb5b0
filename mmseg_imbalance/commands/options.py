"""What the subcommands have in common: their parser, and reading a config."""

from __future__ import annotations

import argparse
import sys
from importlib.util import module_from_spec, spec_from_file_location
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mmengine.config import Config


def command_parser(name: str, description: str, example: str) -> argparse.ArgumentParser:
    """The parser of a subcommand; ``example`` are lines without ``mmseg-imbalance NAME``."""
    lines = '\n'.join(f'  mmseg-imbalance {name} {line}' for line in example.splitlines())
    return argparse.ArgumentParser(
        prog=f'mmseg-imbalance {name}',
        description=description,
        epilog=f'example:\n{lines}',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def need_mmsegmentation() -> None:
    """Raise ImportError, which says what to install, where MMSegmentation is absent."""
    import mmseg_imbalance.registry  # noqa: F401


def run_tool(name: str, argv: list[str] | None) -> int:
    """Run tools/NAME.py of the checkout or of the installed package in this process.

    Raises:
        ImportError: MMSegmentation is not installed.
    """
    need_mmsegmentation()
    from mmseg_imbalance.shipped import tools

    argv = sys.argv[1:] if argv is None else argv
    sys.argv = [f'mmseg-imbalance {name}', *argv]  # its name in usage and errors
    sys.path.insert(0, str(tools()))  # of what the scripts share
    spec = spec_from_file_location(f'mmseg_imbalance_{name}', tools() / f'{name}.py')
    script = module_from_spec(spec)
    spec.loader.exec_module(script)
    script.main(argv)
    return 0


def add_cfg_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        type=_setting,
        metavar='KEY=VALUE',
        help='override settings of the config, as in train_dataloader.dataset.data_root=data/camvid',
    )


def add_cache_dir(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        '--cache-dir',
        metavar='DIR',
        help='folder of the counts; default: $MMSEG_IMBALANCE_CACHE, else ~/.cache/mmseg_imbalance',
    )


def _setting(text: str) -> str:
    if '=' not in text:
        raise argparse.ArgumentTypeError(f'{text!r} is not KEY=VALUE')
    return text


def read_config(path: str, cfg_options: list[str] | None) -> Config:
    """The config with the command line's changes in it; its scope becomes MMEngine's default.

    Raises:
        ImportError: MMSegmentation is not installed.
        ValueError: it is no Python, or its ``_base_`` is of no package that MMEngine knows.
    """
    need_mmsegmentation()
    from mmengine.config import Config, DictAction
    from mmengine.registry import init_default_scope

    import mmseg_imbalance.compat  # noqa: F401  where mmseg:: bases are found

    try:
        cfg = Config.fromfile(path)
    except (SyntaxError, NameError, AssertionError) as error:  # in which MMEngine does not name the file
        raise ValueError(f'{path} cannot be read: {type(error).__name__}: {error}') from error
    if cfg_options:
        options = argparse.Namespace()
        DictAction(['--cfg-options'], 'cfg_options')(argparse.ArgumentParser(), options, cfg_options)
        cfg.merge_from_dict(options.cfg_options)
    init_default_scope(cfg.get('default_scope', 'mmseg'))
    return cfg
