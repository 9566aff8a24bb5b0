"""The options of a loss in a config: taken into terms, checked, and explained where they are not known."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from difflib import get_close_matches
from inspect import Parameter
from numbers import Integral, Real
from typing import Any

NAMED = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
# of MMSegmentation's CrossEntropyLoss, which a config inherits where _delete_=True is forgotten
INHERITED = ('use_sigmoid', 'use_mask', 'reduction', 'avg_non_ignore')


def take(kind: Any, options: dict[str, Any], *given: object) -> Any:
    """Make a term of this kind, its fields taken out of the options of a loss.

    ``kind.OPTIONS`` says which option in a config sets which field: 'reduction' alone would be taken for
    that of MMSegmentation's losses.
    """
    names = [name for name in options if name in kind.OPTIONS]
    return kind(*given, **{kind.OPTIONS[name]: options.pop(name) for name in names})


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """Raise a ValueError that names the option unless its value is one of the choices."""
    if value not in choices:
        raise ValueError(f'{name} must be one of {choices}, got {value!r}')


def check_at_least_0(**values: object) -> None:
    """Raise a ValueError that names the option unless each value is a finite number, at least 0."""
    for name, value in values.items():
        if not (isinstance(value, Real) and 0 <= float(value) < math.inf):
            raise ValueError(f'{name} must be a finite number, at least 0, got {value!r}')


def check_whole(least: int, **values: object) -> None:
    """Raise a ValueError that names the option unless each value is a whole number, at least so large."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
            raise ValueError(f'{name} must be a whole number, at least {least}, got {value!r}')


def not_handed_over(needs: str) -> str:
    """The message of a loss that is in another head than a Feature head; it begins with the loss's name."""
    return (
        f'{needs}, which this head does not hand over. These do: FeatureASPPHead, '
        "FeatureDepthwiseSeparableASPPHead, FeatureSegformerHead, and dict(type='FeatureHead', "
        "base='UPerHead') for most others"
    )


def unknown_options(unknown: Mapping[str, object], loss: Any, base: type) -> str:
    """The message about options that a loss does not have; ``base`` has those of all losses."""
    signatures = [inspect.signature(kind).parameters.values() for kind in (loss, base)]
    own, common = ([p.name for p in each if p.kind in NAMED] for each in signatures)
    allowed = list(dict.fromkeys([*own, *loss.term_options, *common]))
    named = ', '.join(f'{name}={value!r}' for name, value in unknown.items())
    message = f'{loss.__name__} has no option {named}. '
    for name in unknown:
        if close := get_close_matches(name, allowed, 1):
            message += f'Is {close[0]} meant? '
    if any(name in INHERITED for name in unknown):
        message += (
            "The config inherits options of MMSegmentation's CrossEntropyLoss from its base. Write "
            f"loss_decode=dict(_delete_=True, type='{loss.__name__}', ...). "
        )
    if 'mode' in unknown:
        message += "mode='similarity' is now a loss of its own, SimilaritySubclassifiedLoss. "
    return f'{message}Its options are {", ".join(allowed)}'


def refuse_other_reductions(loss: str, avg_factor: object, reduction_override: object, channels: int) -> None:
    """Raise a ValueError unless a head, with so many output channels, asks for the mean over the batch."""
    if avg_factor is not None or reduction_override not in (None, 'mean'):
        one = ' in a Feature head, or with out_channels=2' if channels == 1 else ''
        raise ValueError(
            f'{loss} is a mean over its own pixels and classes; it takes no avg_factor={avg_factor} and no '
            f'reduction_override={reduction_override!r}. An OHEMPixelSampler asks for the loss of each pixel '
            f"unless it has a threshold: sampler=dict(type='OHEMPixelSampler', thresh=0.7){one}"
        )
