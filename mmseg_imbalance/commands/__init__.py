"""The command ``mmseg-imbalance``: a module with ``main(argv)`` for each subcommand, imported when called."""

from __future__ import annotations

import argparse
import sys
from importlib import import_module

from mmseg_imbalance.version import __version__

COMMANDS = {
    'class-weights': 'count the classes of a data set, compare weighting schemes, write class weights',
    'cache': 'list the class counts that are kept, and clear them',
    'train': 'train a model of a config, on GPUs or CPU',
    'test': 'test a trained model; logit adjustment, RankSEG, small regions, test time augmentation',
    'fit-bias': 'one number per class that makes a trained model aim at the mean IoU',
    'compare': 'compare trained models class by class and tell differences from noise',
    'suite': 'run a suite of experiments and collect their results',
    'results': 'make the page of the results of suites, with tests and plots',
    'subclasses': 'show the subclasses that a trained model has found',
    'benchmark': 'time and memory of the losses beside plain cross-entropy',
    'make-scenes': 'generate a small long-tailed data set of street scenes',
    'demo': 'train with and without class balancing on generated scenes and compare',
    'model-zoo': 'write the pages of configs/ from their metafiles',
}


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand.

    Returns:
        The exit status: 0, 1 where it failed; wrong options end with status 2.
    """
    listing = '\n'.join(f'  {name:<15}{what}' for name, what in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog='mmseg-imbalance',
        usage='mmseg-imbalance COMMAND [OPTIONS]',
        description='Class-balanced training for MMSegmentation.',
        epilog=f'commands:\n{listing}\n\nmmseg-imbalance COMMAND --help says how to use each.',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument('--version', action='version', version=f'mmseg-imbalance {__version__}')
    parser.add_argument('command', choices=COMMANDS, metavar='COMMAND', help='one of those below')
    parser.add_argument('arguments', nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    argv = sys.argv[1:] if argv is None else argv
    if not argv:
        parser.print_help(sys.stderr)
        return 2
    args = parser.parse_args(argv)
    try:
        module = import_module(f'mmseg_imbalance.commands.{args.command.replace("-", "_")}')
        return module.main(args.arguments)
    except ImportError as error:  # MMSegmentation, or what an extra brings, is not installed
        print(f'mmseg-imbalance {args.command}: {error}', file=sys.stderr)
        return 1
