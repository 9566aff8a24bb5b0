"""Files of labels: what they hold before anything is made of it, and why one cannot be used."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, BinaryIO

import numpy as np

JPEG_2000 = b'\xff\x4f\xff\x51'  # how a code stream starts
MAY_BE_LOSSY = 'JPEG 2000 with the reversible wavelet'


@contextmanager
def reading(path: str) -> Iterator[None]:
    """What goes wrong inside is an error that names the file and the remedy; a large image is none.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: anything else.
    """
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore', Image.DecompressionBombWarning)  # training reads such an image
            yield
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f'{path}: no such annotation file ({error}). Check data_root, data_prefix and seg_map_suffix.'
        ) from error
    except Image.DecompressionBombError as error:
        raise ValueError(
            f'{path}: more pixels than Pillow reads, which training would meet too ({error}). Three '
            "remedies: LoadAnnotations(imdecode_backend='cv2'), unless the file has a palette; "
            'PIL.Image.MAX_IMAGE_PIXELS = None in a module that custom_imports names, where workers are '
            'forked, as they are by default on Linux; or images cut into tiles.'
        ) from error
    except MemoryError:  # not the file's fault
        raise
    except Exception as error:  # of the decoder, or of a loader of the user's own
        if isinstance(error, KeyError) and error.args == ('seg_map_path',):
            raise ValueError(f'{path} has no annotation. Give data_prefix=dict(seg_map_path=...).') from error
        if limit := re.search(r'CV_IO_MAX_IMAGE_\w+', str(error)):
            raise ValueError(
                f'{path}: larger than OpenCV reads, which training would meet too ({error}). Set the '
                f'environment variable OPEN{limit[0]} to a larger number before the program starts, or cut '
                'the images into tiles.'
            ) from error
        if isinstance(error, AssertionError) and 'reduce_zero_label' in str(error):
            raise ValueError(
                f'{path}: LoadAnnotations and the data set differ in reduce_zero_label ({error}). Set it in '
                'the data set alone.'
            ) from error
        if isinstance(error, KeyError | ImportError | NameError):
            raise ValueError(
                f'{path}: the transform that loads the labels raises {type(error).__name__}: {error}. What '
                'is missing is a key of the results, such as the image where the pipeline loads none, or a '
                'library, not the file. Mend the loading transform or the pipeline before it.'
            ) from error
        raise ValueError(
            f'{path}: cannot be read as a label image ({type(error).__name__}: {error}). '
            'It may be empty, cut off or no image. Replace the file.'
        ) from error


def decode(path: str, loader: Any) -> tuple[np.ndarray, str]:
    """What an image file holds, read as MMSegmentation's `loader` reads it, and its :func:`lossy_format`."""
    import mmcv
    from mmengine import fileio

    data = fileio.get(path, backend_args=loader.backend_args)
    labels = mmcv.imfrombytes(data, flag='unchanged', backend=loader.imdecode_backend)
    if labels is None:
        raise ValueError('the decoder finds no image')
    return labels, lossy_format(io.BytesIO(data))


def as_bytes(values: np.ndarray) -> np.ndarray:
    """What MMSegmentation's loader makes of values, a byte each."""
    with np.errstate(invalid='ignore'):
        return values.astype(np.uint8, copy=False)


def lossy_format(file: BinaryIO) -> str:
    """The name of a compression that does not give back the values that were saved, by content; or ''.

    JPEG 2000 with the reversible wavelet may, and mostly does not: :data:`MAY_BE_LOSSY`.
    """
    start = file.tell()
    head = file.read(16)
    file.seek(start)
    if head[:3] == b'\xff\xd8\xff':
        return 'JPEG'
    if head[:4] == b'RIFF' and head[8:12] == b'WEBP':
        return _lossy_webp(file.read()[12:])
    if head[4:8] == b'jP  ' or head[:4] == JPEG_2000:
        return _lossy_jpeg_2000(file.read())
    if head[4:8] == b'ftyp' and head[8:12] in (b'avif', b'heic', b'heix', b'mif1'):
        return 'AVIF or HEIC'
    if head[:2] in (b'II', b'MM'):
        with suppress(Exception):  # not an image then, which is not asked here
            return _lossy_tiff(file)
    return ''


def _lossy_webp(chunks: bytes) -> str:
    while chunks and chunks[:4] != b'VP8 ':
        size = int.from_bytes(chunks[4:8], 'little')
        chunks = chunks[8 + size + size % 2 :]
    return 'lossy WebP' if chunks else ''


def _lossy_jpeg_2000(data: bytes) -> str:
    at = data.find(JPEG_2000) + 2  # the first marker of the code stream, and the length of its segment
    while data[at : at + 1] == b'\xff' and data[at : at + 2] != b'\xff\x52':  # COD, which names the wavelet
        at += 2 + int.from_bytes(data[at + 2 : at + 4], 'big')
    return MAY_BE_LOSSY if data[at + 13 : at + 14] == b'\1' else 'lossy JPEG 2000'


def _lossy_tiff(file: BinaryIO) -> str:
    """What Pillow would say, also of compressions that it cannot decode and others can."""
    from PIL.TiffImagePlugin import ImageFileDirectory_v2

    header = file.read(8)
    tags = ImageFileDirectory_v2(header + file.read(8 if header[2:4] in (b'\0+', b'+\0') else 0))
    file.seek(tags.next)
    tags.load(file)
    compression: Any = tags.get(259)
    strips: Any = tags.get(273) or tags.get(324)
    if compression in (6, 7):
        return 'TIFF with JPEG compression'
    if compression in (33003, 33004, 33005, 34712, 50001):  # JPEG 2000 and WebP, each strip or tile a file
        file.seek(strips[0])
        inner = lossy_format(file)
        return inner if inner in ('', MAY_BE_LOSSY) else f'TIFF with {inner} compression'
    return ''


def lossy_file(path: str) -> str:
    """The :func:`lossy_format` of a local file, '' of what is none."""
    with suppress(OSError), open(path, 'rb') as file:
        return lossy_format(file)
    return ''


def value_counts(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distinct values and how many pixels hold each.

    `np.bincount` of bytes takes half as long as decoding them from a PNG. So runs of equal pixels
    are counted where they are long, and Pillow counts the others.
    """
    from PIL import Image

    narrow = as_bytes(labels)  # NaN is no byte and so found to differ
    if labels.size == 0 or (narrow is not labels and not np.array_equal(narrow, labels)):
        return np.unique(labels, return_counts=True)
    flat = narrow.ravel()
    breaks = flat[1:] != flat[:-1]
    if np.count_nonzero(breaks) < flat.size // 32:
        ends = np.append(np.flatnonzero(breaks), flat.size - 1)  # last pixel of each run
        counts = np.bincount(flat[ends], np.diff(ends, prepend=-1)).astype(np.int64)
    else:
        row = Image.frombuffer('L', (flat.size, 1), flat, 'raw', 'L', 0, 1)
        counts = np.array(row.histogram())
    values = np.flatnonzero(counts)
    return values, counts[values]


def whole_numbers(values: np.ndarray, path: str) -> np.ndarray:
    """The same values as int64.

    Raises:
        ValueError: they are not whole numbers.
    """
    if values.dtype.kind in 'biu':
        return values.astype(np.int64)
    if broken := [value for value in values.tolist() if not float(value).is_integer()]:
        raise ValueError(
            f'{path}: labels must be whole numbers, got {", ".join(f"{value:g}" for value in broken[:5])} '
            f'among {len(values)} values of {values.dtype}. NaN and fractions come from missing data, from a '
            'resize with interpolation, or from probabilities. Save class indices, and ignore_index where '
            'there is no label.'
        )
    return values.astype(np.int64)
