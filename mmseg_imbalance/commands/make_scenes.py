"""``mmseg-imbalance make-scenes``: generate a data set of street scenes in the layout of Cityscapes."""

from __future__ import annotations

import argparse
from pathlib import Path

from mmseg_imbalance.commands.options import command_parser
from mmseg_imbalance.scenes.dataset import generate

DESCRIPTION = """\
Generate street scenes in the layout of Cityscapes: 19 classes, long-tailed,
objects near and far. For trying things out where no data set is at hand.
Writes

  OUT/leftImg8bit/SPLIT/CITY/*_leftImg8bit.png          RGB
  OUT/gtFine/SPLIT/CITY/*_gtFine_labelTrainIds.png      uint8: 0 to 18, 255 ignored

which MMSegmentation's CityscapesDataset reads. The same seed gives the same
pixels, whatever the number of workers. From 40 images on, a split holds every
class. A call that was interrupted is completed by the next."""
EXAMPLE = 'data/longtail_cityscapes --size 256x128'


def _extent(text: str) -> tuple[int, int]:
    width, _, height = text.partition('x')
    if not (width.isdecimal() and height.isdecimal()):
        raise argparse.ArgumentTypeError(f'{text!r} is not WIDTHxHEIGHT, for instance 512x256')
    return int(width), int(height)


def main(argv: list[str] | None = None) -> int:
    parser = command_parser('make-scenes', DESCRIPTION, EXAMPLE)
    add = parser.add_argument
    add('out', metavar='OUT', type=Path, help='folder to write')
    add('--train', type=int, default=400, metavar='N', help='training images; default %(default)s')
    add('--val', type=int, default=100, metavar='N', help='validation images; default %(default)s')
    add(
        '--size',
        type=_extent,
        default=(512, 256),
        metavar='WxH',
        help='of an image in pixels; default 512x256',
    )
    add('--seed', type=int, default=0, metavar='N', help='default %(default)s')
    add('--workers', type=int, metavar='N', help='processes; default: one for each core, at most 8')
    options = parser.parse_args(argv)
    try:
        written = generate(**vars(options))
    except (ValueError, OSError) as error:
        parser.error(str(error))
    width, height = options.size
    print(
        f'{options.out}: {options.train} train and {options.val} val images of {width}x{height} '
        f'(seed {options.seed}), {written} of them written now'
    )
    return 0
