"""The same as ``mmseg-imbalance class-weights``."""

import sys

from mmseg_imbalance.commands import main

if __name__ == '__main__':
    sys.exit(main(['class-weights', *sys.argv[1:]]))
