"""Sixteen floats at a time: a type for kernels that Numba compiles, whose values stay in registers.

Arithmetic between such values, or of one with a float32, is that of each lane. In a loop over an array the
compiler has to find the vectors itself. It does so only for loops that write to one array, and what one loop
leaves for the next goes through memory.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, overload, register_model

NUMBER = 16
FLOAT, INTEGER = ir.FloatType(), ir.IntType(32)
FLOATS, INTEGERS = ir.VectorType(FLOAT, NUMBER), ir.VectorType(INTEGER, NUMBER)


class Lanes(types.Type):
    """Sixteen float32."""


lanes = Lanes('lanes')


@register_model(Lanes)
class _Model(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: types.Type) -> None:
        super().__init__(manager, kind, FLOATS)


def _kind(*arguments: types.Type) -> types.Type | None:
    """What an operation on these gives: lanes if one of them is, float32 if all are, else None."""
    if not all(x in (lanes, types.float32) for x in arguments):
        return None
    return lanes if lanes in arguments else types.float32


def _moved(builder: Any, values: Any, lane_of: list[int]) -> Any:
    """Lanes taken from these lanes."""
    chosen = ir.Constant(INTEGERS, [INTEGER(lane) for lane in lane_of])
    return builder.shuffle_vector(values, ir.Constant(FLOATS, ir.Undefined), chosen)


def _spread(builder: Any, value: Any) -> Any:
    """The same number in all lanes; lanes as they are."""
    if value.type == FLOATS:
        return value
    first = builder.insert_element(ir.Constant(FLOATS, ir.Undefined), value, INTEGER(0))
    return _moved(builder, first, [0] * NUMBER)


@intrinsic
def spread(typing_context, x):
    """A float32 in all lanes."""
    return lanes(types.float32), lambda context, builder, signature, arguments: _spread(builder, *arguments)


def _operation(symbol: Callable, name: str) -> None:
    """Make an operator of Python work on lanes, or on lanes and a float32."""

    @intrinsic
    def operation(typing_context, a, b):
        def code(context, builder, signature, arguments):
            a, b = (_spread(builder, x) for x in arguments)
            return getattr(builder, name)(a, b, flags=('contract',))

        return lanes(a, b), code

    def of_lanes(a, b):
        return operation(a, b)

    of_lanes.__name__ = of_lanes.__qualname__ = f'{name}_of_lanes'  # compiled code is linked by name

    @overload(symbol)
    def choose(a, b):
        return of_lanes if _kind(a, b) == lanes else None


_operation(operator.add, 'fadd')
_operation(operator.sub, 'fsub')
_operation(operator.mul, 'fmul')
_operation(operator.truediv, 'fdiv')


def _choice(symbol: str) -> Callable:
    @intrinsic
    def choice(typing_context, a, b, x, y):
        kind = _kind(a, b, x, y)

        def code(context, builder, signature, arguments):
            if kind == lanes:
                arguments = [_spread(builder, value) for value in arguments]
            a, b, x, y = arguments
            return builder.select(builder.fcmp_ordered(symbol, a, b), x, y)

        return (kind(a, b, x, y), code) if kind else None

    return choice


# (a, b, x, y), lanes or floats: x where a < b, or a == b; y elsewhere, also where a or b is NaN
where_less, where_equal = _choice('<'), _choice('==')


def _pointer(context: Any, builder: Any, kind: Any, array: Any, index: Any) -> Any:
    # an index of all axes: a view of a row would be counted as a reference, which costs more than the row
    place = cgutils.unpack_tuple(builder, index, kind.ndim)
    array = context.make_array(kind)(context, builder, array)
    at = cgutils.get_item_pointer(context, builder, kind, array, place)
    return builder.bitcast(at, FLOATS.as_pointer())


@intrinsic
def load(typing_context, array, index):
    """Sixteen numbers of a float32 array, along its last axis from ``index``, a tuple."""

    def code(context, builder, signature, arguments):
        return builder.load(_pointer(context, builder, array, *arguments), align=4)

    return lanes(array, index), code


@intrinsic
def store(typing_context, array, index, values):
    """Write lanes to a float32 array, along its last axis from ``index``, a tuple."""

    def code(context, builder, signature, arguments):
        into, place, values = arguments
        builder.store(values, _pointer(context, builder, array, into, place), align=4)
        return context.get_dummy_value()

    return types.void(array, index, lanes), code


@intrinsic
def sum_of(typing_context, values):
    """The sum of the lanes, a float32."""

    def code(context, builder, signature, arguments):
        (values,) = arguments
        half = NUMBER // 2
        while half:  # of what is left, the second half is added to the first
            second = _moved(builder, values, [min(lane + half, NUMBER - 1) for lane in range(NUMBER)])
            values, half = builder.fadd(values, second), half // 2
        return builder.extract_element(values, INTEGER(0))

    return types.float32(lanes), code
