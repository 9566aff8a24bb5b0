"""Pictures of a comparison: images, truth, predictions, errors."""

import base64
import re
from io import BytesIO

import numpy as np
import pytest
from PIL import Image
from test_comparison import write_run

from mmseg_imbalance.commands.compare import main
from mmseg_imbalance.predictions import NO_CLASS, Prediction, save_prediction
from mmseg_imbalance.reports.pictures import (
    MENDED,
    UNLABELLED,
    WORSE,
    WRONG,
    paint_classes,
    paint_errors,
    zoom,
)

PALETTE = np.array([[200, 0, 0], [0, 200, 0], [0, 0, 200], [90, 90, 0], [0, 90, 90], [90, 0, 90]], np.uint8)


def test_the_errors_of_a_prediction_are_marked_and_how_they_changed():
    image = np.full((1, 5, 3), 100, np.uint8)
    truth = np.array([[0, 1, 2, 3, NO_CLASS]])
    before, after = np.array([[0, 0, 0, 3, 1]]), np.array([[0, 0, 2, 1, 2]])
    first = paint_errors(image, truth, before, None)
    assert [tuple(pixel) for pixel in first[0, 1:3]] == [WRONG, WRONG]
    pale = first[0, 0].tolist()
    assert first[0, 3].tolist() == pale
    second = paint_errors(image, truth, after, before)
    assert second[0, :4].tolist() == [pale, list(WRONG), list(MENDED), list(WORSE)]
    assert first[0, 4].tolist() == second[0, 4].tolist() != pale  # no label: neither right nor wrong


def test_classes_have_their_colours_and_no_label_has_none():
    painted = paint_classes(np.zeros((1, 3, 3), np.uint8), np.array([[0, 2, NO_CLASS]]), PALETTE)
    assert painted[0].tolist() == [[144, 0, 0], [0, 0, 144], list(UNLABELLED)]


def objects():
    """A large and a small object of class 5."""
    truth = np.zeros((100, 200), int)
    truth[10:40, 10:40] = 5
    truth[60:70, 150:160] = 5
    return truth


def held(box, mask):
    return mask[box].sum() == mask.sum()


def test_a_picture_is_zoomed_to_the_object_that_changed_else_to_the_largest():
    truth = objects()
    large, small = truth.copy(), truth.copy()
    large[50:], small[:50] = 0, 0
    wrong = np.zeros_like(truth)
    box = zoom(truth, [wrong, wrong], 5)
    assert truth[box].shape == (48, 48)  # 30 pixels and 30 % of room on each side
    assert held(box, large)
    assert not held(box, small)
    box = zoom(truth, [wrong, small], 5)
    assert held(box, small)
    assert truth[box].shape == (40, 40)  # no smaller


def test_a_picture_is_zoomed_to_what_is_predicted_where_the_truth_has_none():
    truth = np.zeros((100, 200), int)
    assert held(zoom(truth, [truth, objects()], 5), objects() * (np.arange(200) < 100))
    assert truth[zoom(truth, [truth, truth], 5)].shape == truth.shape


def test_a_zoomed_picture_stays_within_the_image():
    truth = np.zeros((30, 90), int)
    truth[:, 85:] = 5
    box = zoom(truth, [truth], 5)
    assert truth[box].shape == (30, 48)
    assert held(box, truth)


def with_predictions(folder, photos, **options):
    """A run whose scores are those of the predictions that lie beside them."""
    run = write_run(folder, **options)
    path = next(run.glob('test/*/image_scores.npz'))
    rng = np.random.default_rng(7)
    images = [f'{n}.png' for n in range(6)]
    areas = {key: [] for key in ('intersect', 'union', 'pred', 'label')}
    for image in images:
        truth = rng.integers(0, 6, (5, 4)).repeat(8, 0).repeat(8, 1)
        truth[:2] = NO_CLASS
        wrong = np.random.default_rng([options.get('seed', 0), len(options.get('loss', ''))]).random(
            truth.shape
        )
        prediction = np.where(wrong < 0.3, 0, np.maximum(truth, 0))
        save_prediction(
            path.parent / 'predictions', Prediction(str(photos / image), truth, prediction, PALETTE)
        )
        valid = truth != NO_CLASS
        each = np.arange(6)[:, None]
        of_truth, of_prediction = truth[valid] == each, prediction[valid] == each
        areas['label'].append(of_truth.sum(1))
        areas['pred'].append(of_prediction.sum(1))
        areas['intersect'].append((of_truth & of_prediction).sum(1))
        areas['union'].append((of_truth | of_prediction).sum(1))
    rows = dict(np.load(path)) | dict(images=np.array(images)) | {k: np.array(v) for k, v in areas.items()}
    np.savez(path, **rows)
    return run


@pytest.fixture
def page_of(tmp_path):
    """The page of these runs, and what the command prints."""

    def make(*runs):
        main([*map(str, runs), '--out', str(tmp_path / 'out')])
        return (tmp_path / 'out' / 'comparison.html').read_text()

    return make


@pytest.fixture
def photos(tmp_path):
    """Three of the six images are there, one of them in another size, and one is damaged."""
    folder = tmp_path / 'photos'
    folder.mkdir()
    for n, size in ((0, (32, 40)), (1, (64, 80)), (2, (32, 40))):
        Image.new('RGB', size, (10, 200, 30)).save(folder / f'{n}.png')
    (folder / '3.png').write_bytes(b'')
    (folder / '4.png').write_text('no image')
    return folder


def test_the_page_shows_image_truth_predictions_and_errors_side_by_side(tmp_path, photos, page_of):
    html = page_of(
        with_predictions(tmp_path / 'a', photos),
        with_predictions(tmp_path / 'b', photos, loss='Dice', seed=1),
    )
    blocks = html.split('<div class="example"')[1:]
    assert len(blocks) >= 5
    for block in blocks:
        captions = re.findall('<figcaption>(.*?)</figcaption>', block)[:6]
        assert captions[0] in ('image', 'image: not found')
        assert captions[1:] == ['truth', 'CE', 'Dice', 'errors', 'errors']
        name = re.search(r'(\d)\.png', block)[1]
        assert (captions[0] == 'image') == (name in '012')
        assert ('is not at' in block) == (name not in '012')
        sizes = set()
        for source in re.findall('src="data:image/jpeg;base64,([^"]*)"', block)[:6]:
            with Image.open(BytesIO(base64.b64decode(source))) as picture:
                sizes.add(picture.size)
        assert len(sizes) == 1
    assert 'rider: ' in html
    assert re.search(r'rose in \d and fell in \d of 6 images', html)
    assert not re.search(r'(src|href)="(?!data:)', html)


def test_a_prediction_that_is_gone_or_of_another_truth_is_named_and_stops_nothing(tmp_path, photos, page_of):
    runs = [
        with_predictions(tmp_path / 'a', photos),
        with_predictions(tmp_path / 'b', photos, loss='Dice'),
    ]
    folder = next(runs[1].glob('test/*/predictions'))
    for path in folder.glob('0.png.*'):
        path.unlink()
    labels = np.zeros((40, 32), int)
    save_prediction(folder, Prediction(str(photos / '1.png'), labels, labels, PALETTE))
    html = page_of(*runs)
    assert '0.png is not shown' in html or '1.png is not shown' in html
    assert html.rstrip().endswith('</html>')


def test_without_predictions_page_and_command_say_how_to_get_them(tmp_path, page_of, capsys):
    html = page_of(write_run(tmp_path / 'a'), write_run(tmp_path / 'b', loss='Dice'))
    message = 'no pictures of predictions of CE, Dice: test'
    assert message in html
    assert message in capsys.readouterr().out
    assert 'image/jpeg' not in html
