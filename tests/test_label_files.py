"""Files of labels count as training loads them, or there is one error that says why not."""

import io
import warnings

import mmcv
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from label_sets import of_classes
from mmcv.transforms import BaseTransform
from mmseg.datasets.transforms import LoadAnnotations, PackSegInputs
from PIL import Image, features
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from mmseg_imbalance.counting import count_classes
from mmseg_imbalance.counting.label_files import MAY_BE_LOSSY, lossy_format, reading, value_counts

NAMES = ('background', 'road', 'tree')


@given(
    st.integers(0, 70),
    st.integers(1, 70),
    st.sampled_from([1, 2, 19, 256, 1000, 2**15]),
    st.integers(1, 40),
    st.sampled_from([np.uint8, np.int64, np.uint16, np.int16, np.uint64, bool, np.float32]),
    st.integers(0, 2**32 - 1),
)
def test_value_counts_equal_numpy(height, width, values, run, dtype, seed):
    labels = np.random.default_rng(seed).integers(0, values, height * width)
    labels = np.repeat(labels, run)[: height * width].reshape(height, width).astype(dtype)
    labels = labels - dtype(values // 2) if dtype in (np.int64, np.int16, np.float32) else labels
    for array in (labels, labels.T, labels[::2]):
        got = value_counts(array)
        want = np.unique(array, return_counts=True)
        assert [x.tolist() for x in got] == [x.astype(int).tolist() for x in want]


@pytest.fixture
def warned(monkeypatch):
    messages = []
    monkeypatch.setattr('mmengine.logging.print_log', lambda message, **_: messages.append(message))
    return messages


@pytest.fixture
def save(tmp_path):
    """Write images of labels, a list of them one file each."""
    for name in ('img', 'ann'):
        (tmp_path / name).mkdir()

    def write(*images, suffix='.png', **options):
        for at, image in enumerate(images):
            image = image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image))
            image.save(tmp_path / 'ann' / f'{at}{suffix}', **options)
            (tmp_path / 'img' / f'{at}.jpg').touch()
        return tmp_path

    return write


def make(root, loader=None, after=(), classes=NAMES, suffix='.png', **options):
    pipeline = [loader or LoadAnnotations(), *after, PackSegInputs()]
    return of_classes(root, classes, pipeline=pipeline, seg_map_suffix=suffix, **options)


def seen(dataset):
    """Pixels of each class and ignored ones, as packed for training."""
    packed = [dataset[at]['data_samples'].gt_sem_seg.data.numpy().ravel() for at in range(len(dataset))]
    counts = np.bincount(np.concatenate(packed), minlength=256)
    classes = len(dataset.metainfo['classes'])
    assert counts.sum() == counts[:classes].sum() + counts[255]
    return counts[:classes].tolist(), counts[255]


def counted(dataset, **options):
    frequency = count_classes(dataset, **options)
    return frequency.pixels.tolist(), frequency.ignored


def labels_of(values, size=(9, 14), seed=0):
    return np.random.default_rng(seed).choice(values, size)


# What one data set may hold side by side


def palette(bits):
    image = Image.fromarray(labels_of([0, 1, 2]).astype(np.uint8))
    image.putpalette([0, 0, 0, 90, 90, 0, 0, 200, 0])
    return image, {'bits': bits}


@pytest.mark.parametrize('reduce_zero_label', [False, True])
def test_files_of_different_depth_count_as_training_sees_them(save, reduce_zero_label):
    root = save(
        labels_of([0, 1, 2, 255]).astype(np.uint8),
        labels_of([0, 1, 2, 255]).astype(np.uint16),
        labels_of([False, True]),
    )
    for at, bits in enumerate((2, 4, 8), 3):
        image, options = palette(bits)
        image.save(root / 'ann' / f'{at}.png', **options)
        (root / 'img' / f'{at}.jpg').touch()
    options = {'reduce_zero_label': reduce_zero_label}
    modes = {Image.open(path).mode for path in (root / 'ann').iterdir()}
    assert len(modes) >= 4
    assert counted(make(root, **options)) == seen(make(root, **options))


@pytest.mark.parametrize('kind', [np.uint8, np.uint16, np.int16, np.int32, np.float32])
def test_tiffs_count_as_training_sees_them(save, kind):
    root = save(*(labels_of([0, 1, 2, 255], seed=seed).astype(kind) for seed in range(2)), suffix='.tif')
    assert counted(make(root, suffix='.tif')) == seen(make(root, suffix='.tif'))


@pytest.mark.parametrize('mode', ['LA', 'RGB', 'RGBA'])
def test_several_channels_are_refused_as_training_does(save, mode):
    root = save(Image.fromarray(labels_of([0, 1]).astype(np.uint8)).convert(mode))
    with pytest.raises(ValueError, match=r'0\.png: shape .* but a label image has one channel.*are the same'):
        counted(make(root))
    root = save(np.random.default_rng(0).integers(0, 9, (5, 6, 3)).astype(np.uint8))
    with pytest.raises(ValueError, match=r"one channel.* keeps a palette's\.$"):
        counted(make(root))


# Values that the loader's byte cannot hold


class Unchanged(BaseTransform):
    def transform(self, results):
        return results


@pytest.mark.parametrize('after', [(), (Unchanged(),)], ids=['alone', 'with a transform after it'])
@pytest.mark.parametrize(
    ('value', 'kind'),
    [
        (65535, np.uint16),
        (-1, np.int16),
        (-1, np.int32),
        (-1, np.float32),
        (1023, np.uint16),
        (-257, np.int32),
    ],
)
def test_values_that_become_the_ignored_label_are_ignored_with_one_warning(save, warned, value, kind, after):
    root = save(*(labels_of([0, 1, 2, value], seed=seed).astype(kind) for seed in range(3)), suffix='.tif')
    for options in ({}, {'reduce_zero_label': True}, {'classes': ('a', 'b', 'c', 'd')}):
        got = counted(make(root, after=after, suffix='.tif', **options), num_workers=1)
        want = seen(make(root, suffix='.tif', **options))
        assert got == want
        pixels = sum((np.array(Image.open(path)) == value).sum() for path in (root / 'ann').iterdir())
        (message,) = warned
        what = '255 for the transforms after it' if after else '255, ignored, for training'
        assert f'{value} in the file is {what}, as LoadAnnotations keeps one byte' in message
        assert f'(3 files, {pixels} pixels)' in message
        warned.clear()


def test_what_the_loader_makes_of_values_is_asked_of_the_loader(save, warned):
    """256 becomes 0, which reduce_zero_label ignores; 258 becomes 2, which is class 1 then."""
    root = save(labels_of([0, 1, 2, 256]).astype(np.uint16))
    with pytest.raises(ValueError, match=r'256 -> 0: \d+ pixels.*keeps one byte'):
        counted(make(root))
    assert counted(make(root, reduce_zero_label=True)) == seen(make(root, reduce_zero_label=True))
    assert '256 in the file is 255, ignored,' in warned[0]
    root = save(labels_of([0, 1, 2, 258]).astype(np.uint16))
    with pytest.raises(ValueError, match=r'258 -> 1: \d+ pixels'):
        counted(make(root, reduce_zero_label=True))


@pytest.mark.parametrize(('value', 'label'), [(-9999, 241), (300, 44), (256, 0), (65534, 254), (-2, 254)])
def test_other_values_that_the_loader_changes_are_refused(save, value, label):
    kind = np.uint16 if value > 0 else np.int32
    root = save(labels_of([0, 1, value]).astype(kind), suffix='.tif')
    for classes in (NAMES, tuple(f'class {at}' for at in range(250))):
        with pytest.raises(
            ValueError, match=rf'{value} -> {label}: \d+ pixels.*LoadAnnotations keeps one byte'
        ):
            counted(make(root, classes=classes, suffix='.tif'))


def test_where_a_transform_comes_after_it_decides_and_a_warning_tells(save, warned):
    def nodata(results):
        results['gt_seg_map'][results['gt_seg_map'] == 241] = 255
        return results

    root = save(labels_of([0, 1, -9999]).astype(np.int32), suffix='.tif')
    assert counted(make(root, after=[nodata], suffix='.tif')) == seen(
        make(root, after=[nodata], suffix='.tif')
    )
    assert '-9999 in the file is 241 for the transforms after it' in warned[0]


@pytest.mark.parametrize('value', [0.5, -0.25, np.nan, np.inf])
def test_fractions_and_nan_are_refused(save, value):
    root = save(labels_of([0, 1, value]).astype(np.float32), suffix='.tif')
    for after in ((), (Unchanged(),)):
        with pytest.raises(ValueError, match=rf'0\.tif: labels must be whole numbers, got {value:g} among 3'):
            counted(make(root, after=after, suffix='.tif'))

    def loads(results):
        return {**results, 'gt_seg_map': labels_of([0, 1, value])}

    with pytest.raises(ValueError, match='whole numbers'):
        counted(make(root, loads, suffix='.tif'))

    def loads_words(results):
        return {**results, 'gt_seg_map': np.array([['road', 'tree']])}

    with pytest.raises(ValueError, match='must hold numbers, got an array of <U4'):
        counted(make(root, loads_words, suffix='.tif'))


def test_too_many_dimensions_are_refused(save):
    root = save(labels_of([0, 1]).astype(np.uint8))

    def one_hot(results):
        return {**results, 'gt_seg_map': np.zeros((2, 3, 4, 5))}

    with pytest.raises(ValueError, match=r'has the shape \(2, 3, 4, 5\), allowed are'):
        counted(make(root, one_hot))


# Compression that changes labels


def encoded(labels, **options):
    file = io.BytesIO()
    Image.fromarray(labels).save(file, **options)
    file.seek(0)
    return file


FORMATS = {
    'JPEG': {'format': 'JPEG', 'quality': 95},
    'lossy WebP': {'format': 'WEBP', 'quality': 80},
    'TIFF with JPEG compression': {'format': 'TIFF', 'compression': 'jpeg'},
    'lossy JPEG 2000': {'format': 'JPEG2000', 'irreversible': True},
}
if features.check('avif'):
    FORMATS['AVIF or HEIC'] = {'format': 'AVIF'}
LOSSLESS = [
    {'format': 'PNG'},
    {'format': 'BMP'},
    {'format': 'TIFF'},
    {'format': 'TIFF', 'compression': 'tiff_lzw'},
]


@pytest.mark.parametrize('name', FORMATS)
def test_lossy_files_are_known_by_their_content(name):
    labels = labels_of([0, 1, 2]).astype(np.uint8)
    assert lossy_format(encoded(labels, **FORMATS[name])) == name
    for options in (*LOSSLESS, {'format': 'WEBP', 'lossless': True}):
        assert lossy_format(encoded(labels, **options)) == ''
    assert lossy_format(io.BytesIO(b'')) == lossy_format(io.BytesIO(b'II*\0broken')) == ''


def tiff_of(data, compression, big=False):
    """A TIFF whose only strip is another file, as GDAL writes JPEG 2000 and WebP."""
    tags = ImageFileDirectory_v2(b'II+\0\b\0\0\0' + b'\0' * 8 if big else b'II*\0\0\0\0\0')
    tags[256], tags[257], tags[259], tags[278], tags[279] = 14, 9, compression, 9, len(data)
    tags[273] = 0  # behind the tags
    head = b'II+\0\b\0\0\0' + (16).to_bytes(8, 'little') if big else b'II*\0' + (8).to_bytes(4, 'little')
    return io.BytesIO(head + tags.tobytes(len(head)) + data)


@pytest.mark.parametrize('big', [False, True])
@pytest.mark.parametrize(('name', 'compression'), [('lossy JPEG 2000', 34712), ('lossy WebP', 50001)])
def test_a_tiff_is_as_lossy_as_its_strips(name, compression, big):
    labels = labels_of([0, 1, 2]).astype(np.uint8)
    data = encoded(labels, **FORMATS[name]).read()
    assert lossy_format(tiff_of(data, compression, big)) == f'TIFF with {name} compression'
    lossless = {
        50001: {'format': 'WEBP', 'lossless': True},
        34712: {'format': 'JPEG2000', 'irreversible': False},
    }
    data = encoded(labels, **lossless[compression]).read()
    assert lossy_format(tiff_of(data, compression, big)) == ('' if compression == 50001 else MAY_BE_LOSSY)


def test_lossy_webp_is_known_with_anything_beside_it():
    labels = Image.fromarray(labels_of([0, 1, 2]).astype(np.uint8)).convert('RGBA')
    for lossless, name in ((False, 'lossy WebP'), (True, '')):
        file = io.BytesIO()
        labels.save(file, format='WEBP', lossless=lossless, exif=b'Exif\0\0' + b'VP8 ' * 5)
        assert b'VP8X' in file.getvalue()[:20]
        file.seek(0)
        assert lossy_format(file) == name


@pytest.mark.parametrize('suffix', ['.png', '.jp2'])
@pytest.mark.parametrize('bare', [False, True])
def test_jpeg_2000_is_refused_unless_its_wavelet_is_reversible_and_warned_of_then(save, warned, suffix, bare):
    root = save(labels_of([0, 1, 2]).astype(np.uint8))
    options = {'format': 'JPEG2000', 'no_jp2': bare}
    path = root / 'ann' / f'0{suffix}'
    labels = labels_of([0, 1, 2]).astype(np.uint8)
    path.write_bytes(encoded(labels, irreversible=True, **options).read())
    with pytest.raises(ValueError, match='a label image saved as lossy JPEG 2000'):
        counted(make(root, suffix=suffix))
    path.write_bytes(encoded(labels, irreversible=False, **options).read())
    for after in ((), (Unchanged(),)):
        assert counted(make(root, after=after, suffix=suffix))[0] == np.bincount(labels.ravel()).tolist()
        assert 'only if nothing was cut off to make it smaller' in warned.pop()


@pytest.mark.parametrize('backend', ['pillow', 'cv2'])
@pytest.mark.parametrize('suffix', ['.png', '.jpg'])
@pytest.mark.parametrize('values', [[0, 1, 2], [0, 255], [1]])
def test_labels_saved_as_jpeg_are_an_error_also_under_another_name(save, suffix, values, backend):
    root = save(labels_of(values).astype(np.uint8))
    data = encoded(labels_of(values).astype(np.uint8), **FORMATS['JPEG']).read()
    (root / 'ann' / f'0{suffix}').write_bytes(data)
    with pytest.raises(ValueError, match=rf'0\{suffix}: a label image saved as JPEG.*numpy\.unique.*as PNG'):
        counted(make(root, LoadAnnotations(imdecode_backend=backend), suffix=suffix))


def threshold(results):
    results['gt_seg_map'] = (results['gt_seg_map'] > 127).astype(np.uint8)
    return results


class Thresholding(LoadAnnotations):
    def transform(self, results):
        return threshold(super().transform(results))


def test_jpeg_masks_that_are_binarised_in_the_pipeline_are_counted_with_a_warning(save, warned):
    root = save(*[np.kron(labels_of([0, 255], (4, 4)), np.ones((8, 8))).astype(np.uint8)] * 2)
    want = seen(make(root, after=[threshold]))
    for path in (root / 'ann').iterdir():
        path.write_bytes(encoded(np.array(Image.open(path)), **FORMATS['JPEG']).read())
    assert counted(make(root, after=[threshold])) == want
    assert counted(make(root, Thresholding())) == want
    assert len(warned) == 2
    for message in warned:
        assert 'a JPEG file does not keep labels' in message
        assert '2 files' in message


# Limits of decoders


def test_a_file_above_pillows_limit_names_it_and_what_works(save, monkeypatch):
    root = save(labels_of([0, 1], (40, 50)).astype(np.uint8))
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 900)
    with pytest.raises(Image.DecompressionBombError):
        make(root)[0]
    for loader in (LoadAnnotations(), Thresholding()):
        with pytest.raises(
            ValueError, match=r'0\.png: more pixels than Pillow reads.*MAX_IMAGE_PIXELS'
        ) as caught:
            counted(make(root, loader))
        assert "imdecode_backend='cv2'" in str(caught.value)
    want = seen(make(root, LoadAnnotations(imdecode_backend='cv2')))
    assert counted(make(root, LoadAnnotations(imdecode_backend='cv2'))) == want
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', None)
    assert counted(make(root), num_workers=1) == seen(make(root)) == want


def test_a_file_above_half_of_pillows_limit_is_counted(save, monkeypatch):
    root = save(labels_of([0, 1], (40, 50)).astype(np.uint8))
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 1500)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        pixels, _ = counted(make(root))
        assert counted(make(root, after=[Unchanged()]))[0] == pixels
    assert sum(pixels) == 2000


def test_a_file_above_opencvs_limit_names_the_variable(save, monkeypatch):
    """The limit is read when OpenCV is loaded: its error stands in for a file of 2^30 pixels."""
    root = save(labels_of([0, 1]).astype(np.uint8))

    decode = mmcv.imfrombytes

    def refuse(data, flag, backend):
        if backend == 'pillow':
            return decode(data, flag, backend=backend)
        raise RuntimeError(
            "(-215:Assertion failed) pixels <= CV_IO_MAX_IMAGE_PIXELS in function 'validateInput'"
        )

    monkeypatch.setattr('mmcv.imfrombytes', refuse)
    with pytest.raises(ValueError, match=r'0\.png: larger than OpenCV reads.* OPENCV_IO_MAX_IMAGE_PIXELS to'):
        counted(make(root, LoadAnnotations(imdecode_backend='cv2')))


def test_a_lack_of_memory_is_not_blamed_on_the_file():
    with pytest.raises(MemoryError), reading('0.png'):
        raise MemoryError


def test_lossy_webp_is_known_behind_a_chunk_of_odd_length():
    chunks = b'EXIF' + (3).to_bytes(4, 'little') + b'abc\0' + b'VP8 ' + bytes(8)
    file = io.BytesIO(b'RIFF' + bytes(4) + b'WEBP' + chunks)
    assert lossy_format(file) == 'lossy WebP'
