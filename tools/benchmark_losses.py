"""The same as ``mmseg-imbalance benchmark``."""

import sys

from mmseg_imbalance.commands import main

if __name__ == '__main__':
    sys.exit(main(['benchmark', *sys.argv[1:]]))
