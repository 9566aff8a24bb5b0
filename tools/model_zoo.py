"""The same as ``mmseg-imbalance model-zoo``."""

import sys

from mmseg_imbalance.commands import main

if __name__ == '__main__':
    sys.exit(main(['model-zoo', *sys.argv[1:]]))
