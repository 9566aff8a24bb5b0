"""The same as ``mmseg-imbalance demo``."""

import sys

from mmseg_imbalance.commands import main

if __name__ == '__main__':
    sys.exit(main(['demo', *sys.argv[1:]]))
