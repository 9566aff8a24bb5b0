"""The same as ``mmseg-imbalance compare``."""

import sys

from mmseg_imbalance.commands import main

if __name__ == '__main__':
    sys.exit(main(['compare', *sys.argv[1:]]))
