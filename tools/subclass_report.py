"""The same as ``mmseg-imbalance subclasses``."""

import sys

from mmseg_imbalance.commands import main

if __name__ == '__main__':
    sys.exit(main(['subclasses', *sys.argv[1:]]))
