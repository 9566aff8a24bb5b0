"""The same as ``mmseg-imbalance make-scenes``."""

import sys

from mmseg_imbalance.commands import main

if __name__ == '__main__':
    sys.exit(main(['make-scenes', *sys.argv[1:]]))
