"""Class names in any script: drawn where a font has them, one warning where none does, files as they are."""

import json
import warnings

import matplotlib
import numpy as np
import pytest
from conftest import REPOSITORY
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager
from matplotlib.figure import Figure
from PIL import Image
from test_class_balance import ClassBalance

from mmseg_imbalance import fonts
from mmseg_imbalance.class_weight import WeightRecord
from mmseg_imbalance.fonts import fonts_for
from mmseg_imbalance.frequency import ClassFrequency
from mmseg_imbalance.plots import SubclassMaps, draw_subclasses, plot_class_balance, plot_class_weights
from mmseg_imbalance.tables import class_table, table_text

NAMES = ('道路', 'дорога', 'شارع')
LATIN = ('road', 'façade', 'Straße')


@pytest.fixture(autouse=True)
def nothing_told(monkeypatch):
    monkeypatch.setattr(fonts, '_told', set())
    fonts._families.cache_clear()
    yield
    fonts._families.cache_clear()


@pytest.fixture
def no_other_fonts(monkeypatch):
    """Only those that come with Matplotlib."""
    own = [entry for entry in font_manager.fontManager.ttflist if matplotlib.get_data_path() in entry.fname]
    monkeypatch.setattr(font_manager.fontManager, 'ttflist', own)
    monkeypatch.setattr(font_manager, 'findSystemFonts', lambda *_: [])


def make_font(path, name, characters):
    """A font in which each of these characters is a black square."""
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0))
    for corner in ((0, 800), (800, 800), (800, 0)):
        pen.lineTo(corner)
    pen.closePath()
    glyphs = ['.notdef', *(f'u{ord(c):x}' for c in characters)]
    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder(glyphs)
    builder.setupCharacterMap({ord(c): f'u{ord(c):x}' for c in characters})
    square = pen.glyph()
    builder.setupGlyf({glyph: square if glyph != '.notdef' else TTGlyphPen(None).glyph() for glyph in glyphs})
    builder.setupHorizontalMetrics(dict.fromkeys(glyphs, (1000, 0)))
    builder.setupHorizontalHeader(ascent=800, descent=-200)
    builder.setupNameTable(dict(familyName=name, styleName='Regular'))
    builder.setupOS2()
    builder.setupPost()
    builder.save(path)
    return str(path)


def counted(names):
    size = len(names)
    pixels = np.arange(1, size + 1) * 100
    return ClassFrequency(names, pixels, np.ones(size, int), pixels, 0, 2, 2)


def told(*arguments, draw=plot_class_weights):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        draw(*arguments)
    return [str(warning.message) for warning in caught if 'deprecat' not in str(warning.message)]


def test_a_font_that_has_the_characters_is_taken(no_other_fonts, monkeypatch, tmp_path):
    # installed after Matplotlib has made its list
    paths = [make_font(tmp_path / 'a.ttf', 'Squares', '道'), make_font(tmp_path / 'b.ttf', 'Roads', '道路')]
    monkeypatch.setattr(font_manager, 'findSystemFonts', lambda *_: [*paths, str(tmp_path / 'none.ttf')])
    monkeypatch.setattr(font_manager.fontManager, 'ttflist', list(font_manager.fontManager.ttflist))
    weights = np.ones(3)
    assert told(counted(NAMES), weights, tmp_path / 'chart.png') == []
    with fonts_for(NAMES):
        assert matplotlib.rcParams['font.family'] == ['sans-serif', 'Roads']
        figure = Figure(figsize=(3, 1), dpi=100)
        figure.text(0.1, 0.3, '道路', fontsize=40)
        figure.savefig(tmp_path / 'text.png')
    assert matplotlib.rcParams['font.family'] == ['sans-serif']
    dark = np.array(Image.open(tmp_path / 'text.png').convert('L')) < 100
    squares = 2 * (0.8 * 40 / 72 * 100) ** 2  # full ones, where a box is hollow
    assert dark.sum() == pytest.approx(squares, rel=0.05)


def test_one_warning_names_what_no_font_has(no_other_fonts, tmp_path):
    weights = np.ones(3)
    message = told(counted(NAMES), weights, tmp_path / 'a.png')
    assert len(message) == 1
    assert 'no installed font has 路道' in message[0]
    assert told(counted(NAMES), weights, tmp_path / 'b.svg') == []
    assert told(counted(('路', 'a', 'b')), weights, tmp_path / 'c.png') == []


def test_all_charts_with_class_names_are_treated_so(no_other_fonts, tmp_path):
    shares = np.full(3, 0.3)
    report = ClassBalance(1, shares, shares, shares, shares)
    balance = (NAMES, dict(decode=[report, report._replace(iteration=2)]), tmp_path / 'balance.png')
    assert len(told(*balance, draw=plot_class_balance)) == 1
    maps = SubclassMaps(np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8), int), np.ones((8, 8)), None)
    palette = np.full((3, 3), 90)
    assert told(maps, NAMES, palette, None, draw=draw_subclasses) == []  # told already
    fonts._told.clear()
    assert len(told(maps, NAMES, palette, None, draw=draw_subclasses)) == 1


def test_where_names_are_drawn_fonts_are_looked_for():
    for path in (REPOSITORY / 'mmseg_imbalance').rglob('*.py'):
        text = path.read_text(encoding='utf-8')
        # the benchmark's tables, of names of losses; what page.py draws with its own fonts
        if 'Figure(' in text and path.name not in ('tables.py', 'confusion.py'):
            assert 'with fonts_for(' in text, path


def test_usual_names_need_no_other_font(monkeypatch, tmp_path):
    def fail(*_):
        raise AssertionError('looked for fonts')

    monkeypatch.setattr(font_manager, 'findSystemFonts', fail)
    for names in (LATIN, ('дорога', 'Ελλάδα', 'شارع')):  # Matplotlib's own font has them
        assert told(counted(names), np.ones(3), tmp_path / 'a.png') == []


def test_tables_and_files_hold_the_names_as_they_are(tmp_path):
    record = WeightRecord.count(counted(NAMES), np.ones(3))
    record.save(tmp_path / 'weights.json')
    assert WeightRecord.load(tmp_path / 'weights.json').classes == list(NAMES)
    assert json.loads((tmp_path / 'weights.json').read_text(encoding='utf-8'))['classes'] == list(NAMES)
    text = table_text(class_table(counted(NAMES), dict(weight=np.ones(3))))
    assert all(name in text for name in NAMES)
