"""``python -m mmseg_imbalance``, the same as the command ``mmseg-imbalance``."""

import sys

from mmseg_imbalance.commands import main

if __name__ == '__main__':
    sys.exit(main())
