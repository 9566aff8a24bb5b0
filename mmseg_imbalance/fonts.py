"""Names of any characters in charts: Matplotlib's own font has no Chinese, Japanese or Korean, among others.

Matplotlib is imported where something is drawn.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any

_told: set[str] = set()  # characters that a warning has named


def plain(text: str) -> str:
    """As Matplotlib shows it as it is: between two $ it would read a formula."""
    return text.replace('$', r'\$')


@contextmanager
def fonts_for(names: Iterable[str]) -> Iterator[None]:
    """Within, Matplotlib draws each character of these names in an installed font that has it.

    Characters that no font has are boxes; one warning names them, instead of one for each on each chart.
    """
    from matplotlib import rc_context, rcParams

    usual = tuple(rcParams['font.family'])
    others, missing = _families(
        frozenset(c for c in ''.join(names) if ord(c) > 127 and not c.isspace()), usual
    )
    if new := missing - _told:
        _told.update(new)
        warnings.warn(
            f'no installed font has {"".join(sorted(new))}: charts show boxes for these characters; tables '
            'and files hold them. Install a font of this script, such as Noto Sans CJK',
            stacklevel=3,
        )
    with rc_context({'font.family': [*usual, *others]}), warnings.catch_warnings():
        warnings.filterwarnings('ignore', r'Glyph .* missing from')
        yield


@cache
def _families(characters: frozenset[str], usual: tuple[str, ...]) -> tuple[list[str], frozenset[str]]:
    """Families that have what the usual ones lack, as few as possible, and the characters that none has."""
    from matplotlib.font_manager import FontProperties, findfont, findSystemFonts, fontManager

    for family in usual:
        characters -= _held(findfont(FontProperties(family=[family])), characters)
    if not characters:
        return [], characters
    for path in {*findSystemFonts()} - {entry.fname for entry in fontManager.ttflist}:
        with suppress(Exception):  # installed since Matplotlib made its list; it cannot read each of them
            fontManager.addfont(path)
    held: dict[str, frozenset[str]] = {}
    for entry in sorted(fontManager.ttflist, key=_oddity):
        if 'Last Resort' not in entry.name:  # boxes for everything
            held.setdefault(entry.name, _held(entry.fname, characters))
    families = []
    while held and (best := max(held, key=lambda name: len(held[name] & characters))):
        if not held[best] & characters:
            break
        families.append(best)
        characters -= held[best]
    return families, characters


def _oddity(entry: Any) -> tuple[bool, bool, str]:
    """Upright fonts of usual weight come first."""
    return entry.style != 'normal', entry.weight not in (400, 'normal', 'regular'), entry.name


def _held(path: str, characters: frozenset[str]) -> frozenset[str]:
    from matplotlib.ft2font import FT2Font

    try:
        font = FT2Font(path)
    except (OSError, RuntimeError):
        return frozenset()
    if not font.scalable:  # pictures of fixed size, which Matplotlib does not draw
        return frozenset()
    return frozenset(character for character in characters if font.get_char_index(ord(character)))
