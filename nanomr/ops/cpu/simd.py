"""SIMD values for Numba: a ``vector`` of numbers and a ``tile`` of ROWS vectors of sums, all in registers.

A vector is 16 numbers (one AVX-512 register, two AVX or four SSE ones), or twice as many. What a kernel multiplies is
said by a :class:`Lanes`, which it gets as an argument: float32 numbers, or *words*. A word is a pair of bfloat16
numbers in 32 bits, and the product of two words is the sum of two products, which are exact in float32. Sums are
float32, always. One number that is broadcast to a wide vector saves a load for each of its parts.

All indices are offsets, in elements, into the array's memory (C-contiguous); nothing is checked.
"""

import os
from functools import cache
from typing import NamedTuple

from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba.core import cgutils, types
from numba.extending import NativeValue, intrinsic, models, register_model, typeof_impl, unbox


def has(feature: str) -> bool:
    chosen = os.environ.get("NUMBA_CPU_FEATURES")
    return f"+{feature}" in chosen if chosen is not None else get_host_cpu_features().get(feature, False)


AVX512 = has("avx512f")
WIDTH = 16  # numbers in the narrow vector
ROWS = 8 if AVX512 else 4  # accumulators: what leaves registers for the operands, by trial
MAX_LANES = 2 if AVX512 else 1

# How words are multiplied: by one instruction (AVX-512 BF16), or by two float32 products (any machine).
PRODUCTS = ("avx512_bf16", "fma") if AVX512 and has("avx512bf16") else ("fma",)


class Lanes(NamedTuple):
    """A vector is 16 ``count`` numbers, and ``product`` says of what: "float32", or words by one of PRODUCTS."""

    count: int
    product: str = "float32"


_I64, _I32, _I16, _FLOAT = ir.IntType(64), ir.IntType(32), ir.IntType(16), ir.FloatType()


# --- types ------------------------------------------------------------------------------------------------------------


class _LanesType(types.Type):
    def __init__(self, count, product):
        self.width, self.product = WIDTH * count, product
        self.element = _FLOAT if product == "float32" else _I32
        super().__init__(name=f"Lanes({count}, {product})")


class _Value(types.Type):
    """A type that is nothing but its LLVM type."""

    def __init__(self, name, llvm):
        self.llvm = llvm
        super().__init__(name=name)


class Sums(_Value):
    def __init__(self, width):
        super().__init__(f"sums{width}", ir.VectorType(_FLOAT, width))


class Tile(_Value):
    def __init__(self, width):
        super().__init__(f"tile{width}", ir.ArrayType(ir.VectorType(_FLOAT, width), ROWS))


class Operand(_Value):
    def __init__(self, lanes):
        self.product = lanes.product
        super().__init__(f"operand of {lanes.name}", ir.VectorType(lanes.element, lanes.width))


class Rows(_Value):
    """ROWS addresses."""

    def __init__(self, element):
        super().__init__(f"rows of {element}", ir.ArrayType(element.as_pointer(), ROWS))


@register_model(Sums)
@register_model(Tile)
@register_model(Operand)
@register_model(Rows)
class _Model(models.PrimitiveModel):
    def __init__(self, manager, kind):
        super().__init__(manager, kind, kind.llvm)


register_model(_LanesType)(models.OpaqueModel)


_type_of_lanes = cache(lambda lanes: _LanesType(*lanes))


@typeof_impl.register(Lanes)
def _typeof(value, _):
    return _type_of_lanes(value)


@unbox(_LanesType)
def _unbox(kind, _, context):
    return NativeValue(context.context.get_dummy_value())


# --- what LLVM is told ------------------------------------------------------------------------------------------------


def address(context, builder, array_type, array, index):
    return builder.gep(context.make_array(array_type)(context, builder, array).data, [index])


def _load(builder, address, kind):
    value = builder.load(builder.bitcast(address, kind.as_pointer()))
    value.align = 2 if kind.element == _I16 else 4
    return value


def call(builder, name, result, arguments):
    function = builder.module.globals.get(name)
    function = function or ir.Function(builder.module, ir.FunctionType(result, [a.type for a in arguments]), name)
    return builder.call(function, arguments)


def _splat(kind, value):
    return ir.Constant(kind, [value] * kind.count)


def _broadcast(builder, scalar, width):
    undefined = ir.Constant(ir.VectorType(scalar.type, width), ir.Undefined)
    first = builder.insert_element(undefined, scalar, ir.Constant(_I32, 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(_I32, width), [0] * width))


def _part(builder, vector, first, count):
    order = ir.Constant(ir.VectorType(_I32, count), list(range(first, first + count)))
    return builder.shuffle_vector(vector, ir.Constant(vector.type, ir.Undefined), order)


def _fma(builder, a, b, c):
    return call(builder, f"llvm.fma.v{c.type.count}f32", c.type, [a, b, c])


def _halves(builder, words):
    """The two bfloat16 numbers of each word, as float32."""
    floats = ir.VectorType(_FLOAT, words.type.count) if isinstance(words.type, ir.VectorType) else _FLOAT
    constant = lambda n: _splat(words.type, n) if floats is not _FLOAT else ir.Constant(_I32, n)  # noqa: E731
    low, high = builder.shl(words, constant(16)), builder.and_(words, constant(0xFFFF0000))
    return builder.bitcast(low, floats), builder.bitcast(high, floats)


def _multiply(builder, product, scalar, b, c):
    """scalar b + c: one number or word times a vector of them, added to sums."""
    width = c.type.count
    if product == "float32":
        return _fma(builder, _broadcast(builder, scalar, width), b, c)
    if product == "fma":
        for one, many in zip(_halves(builder, scalar), _halves(builder, b), strict=True):
            c = _fma(builder, _broadcast(builder, one, width), many, c)
        return c
    sixteen = _broadcast(builder, scalar, WIDTH)
    parts = [
        call(
            builder,
            "llvm.x86.avx512bf16.dpbf16ps.512",
            ir.VectorType(_FLOAT, WIDTH),
            [_part(builder, c, i, WIDTH), _part(builder, b, i, WIDTH), sixteen],
        )
        for i in range(0, width, WIDTH)
    ]
    if len(parts) == 1:
        return parts[0]
    return builder.shuffle_vector(*parts, ir.Constant(ir.VectorType(_I32, width), list(range(width))))


def round_to_bf16(builder, value):
    """The bits of float32 ``value`` (one, or a vector) as bfloat16: to nearest, ties to even; NaN stays NaN."""
    if vector := isinstance(value.type, ir.VectorType):
        wide, narrow = (ir.VectorType(kind, value.type.count) for kind in (_I32, _I16))
    else:
        wide, narrow = _I32, _I16
    constant = lambda n: _splat(wide, n) if vector else ir.Constant(wide, n)  # noqa: E731
    bits = builder.bitcast(value, wide)
    odd = builder.and_(builder.lshr(bits, constant(16)), constant(1))
    rounded = builder.add(builder.add(bits, constant(0x7FFF)), odd)
    number = builder.fcmp_ordered("ord", value, value)
    quiet = builder.or_(bits, constant(0x400000))
    return builder.trunc(builder.lshr(builder.select(number, rounded, quiet), constant(16)), narrow)


def _mask(builder, width, first, last):
    order = ir.Constant(ir.VectorType(_I64, width), list(range(width)))
    above = builder.icmp_signed(">=", order, _broadcast(builder, first, width))
    return builder.and_(above, builder.icmp_signed("<", order, _broadcast(builder, last, width)))


def _whole(builder, width, first, last):
    """Is first <= 0 and width <= last: no mask needed?"""
    low = builder.icmp_signed("<=", first, ir.Constant(_I64, 0))
    return builder.and_(low, builder.icmp_signed(">=", last, ir.Constant(_I64, width)))


def _typed(builder, address, width):
    """(a pointer to a vector, its type, LLVM's name of it) at the address of its first element."""
    element = address.type.pointee
    kind = ir.VectorType(element, width)
    return builder.bitcast(address, kind.as_pointer()), kind, f"v{width}{'i16' if element == _I16 else 'f32'}"


def _store(builder, value, address, first, last):
    """The numbers first <= j < last only, number j at address + j; float32, or rounded where 16 bits are stored."""
    width = value.type.count
    pointer, kind, name = _typed(builder, address, width)
    align = 2 if kind.element == _I16 else 4
    value = round_to_bf16(builder, value) if kind.element == _I16 else value
    with builder.if_else(_whole(builder, width, first, last)) as (whole, some):
        with whole:
            builder.store(value, pointer).align = align
        with some:
            if AVX512:
                arguments = [value, pointer, ir.Constant(_I32, align), _mask(builder, width, first, last)]
                call(builder, f"llvm.masked.store.{name}.p0", ir.VoidType(), arguments)
            else:
                _store_pieces(builder, value, address, first, last)


def _store_pieces(builder, value, address, first, last):
    """The same by way of the stack, in pieces of 8, 4, 2 and 1 numbers: without AVX-512 masked stores are slow on some
    processors (Zen 3: an input gradient of 3 channels took a third longer by them)."""
    width, element = value.type.count, value.type.element
    numbers = cgutils.alloca_once(builder, value.type)
    builder.store(value, numbers)
    numbers = builder.bitcast(numbers, element.as_pointer())
    zero = ir.Constant(_I64, 0)
    at = builder.select(builder.icmp_signed(">", first, zero), first, zero)
    end = ir.Constant(_I64, width)
    end = builder.select(builder.icmp_signed("<", last, end), last, end)
    count = builder.sub(end, at)
    count = builder.select(builder.icmp_signed(">", count, zero), count, zero)
    size = width
    while size := size // 2:
        kind = ir.VectorType(element, size)
        some = builder.and_(count, ir.Constant(_I64, size))
        with builder.if_then(builder.icmp_signed("!=", some, zero)):
            source, target = (builder.bitcast(builder.gep(p, [at]), kind.as_pointer()) for p in (numbers, address))
            piece = builder.load(source)
            piece.align = builder.store(piece, target).align = 2 if element == _I16 else 4
        at = builder.add(at, some)


def _plus(builder, value, address, first, last):
    """value + the numbers first <= j < last at ``address``, 0 for the others."""
    pointer, kind, name = _typed(builder, address, value.type.count)
    align = ir.Constant(_I32, 2 if kind.element == _I16 else 4)
    mask = _mask(builder, kind.count, first, last)
    nothing = _splat(kind, 0 if kind.element == _I16 else 0.0)
    found = call(builder, f"llvm.masked.load.{name}.p0", kind, [pointer, align, mask, nothing])
    if kind.element == _I16:
        words = ir.VectorType(_I32, kind.count)
        found = builder.bitcast(builder.shl(builder.zext(found, words), _splat(words, 16)), value.type)
    return builder.fadd(value, found)


# --- one vector -------------------------------------------------------------------------------------------------------


@intrinsic
def width(typingctx, lanes):
    """How many numbers are in a vector."""
    return types.intp(lanes), lambda context, builder, signature, args: ir.Constant(_I64, signature.args[0].width)


@intrinsic
def load(typingctx, array, index, lanes):
    """array[index :], a vector to multiply by."""

    def codegen(context, builder, signature, args):
        return _load(builder, address(context, builder, signature.args[0], *args[:2]), signature.return_type.llvm)

    return Operand(lanes)(array, types.intp, lanes), codegen


@intrinsic
def load_sums(typingctx, array, index, lanes):
    """array[index :], float32: what sums begin with."""

    def codegen(context, builder, signature, args):
        return _load(builder, address(context, builder, signature.args[0], *args[:2]), signature.return_type.llvm)

    return Sums(lanes.width)(array, types.intp, lanes), codegen


@intrinsic
def offset(typingctx, table, index):
    """table[index], int64; unlike Numba's own indexing it does not ask whether the index is negative."""

    def codegen(context, builder, signature, args):
        return builder.load(address(context, builder, signature.args[0], *args))

    return types.int64(table, types.intp), codegen


@intrinsic
def store(typingctx, array, index, value, first, last):
    """array[index + j] = number j of the sums ``value``, for first <= j < last."""

    def codegen(context, builder, signature, args):
        _store(builder, args[2], address(context, builder, signature.args[0], *args[:2]), *args[3:])
        return context.get_dummy_value()

    return types.void(array, types.intp, value, types.intp, types.intp), codegen


@intrinsic
def plus(typingctx, array, index, value, first, last):
    """value + array[index + j], for first <= j < last."""

    def codegen(context, builder, signature, args):
        return _plus(builder, args[2], address(context, builder, signature.args[0], *args[:2]), *args[3:])

    return value(array, types.intp, value, types.intp, types.intp), codegen


@intrinsic
def copy(typingctx, source, start, target, at, lanes):
    """target[at :] = source[start :], one vector, whatever it holds."""

    def codegen(context, builder, signature, args):
        kind = ir.VectorType(signature.args[4].element, signature.args[4].width)
        value = _load(builder, address(context, builder, signature.args[0], *args[:2]), kind)
        there = address(context, builder, signature.args[2], *args[2:4])
        builder.store(value, builder.bitcast(there, kind.as_pointer())).align = 4
        return context.get_dummy_value()

    return types.void(source, types.intp, target, types.intp, lanes), codegen


@intrinsic
def add(typingctx, sums, b):
    """sums + b; a word is the sum of its two numbers."""

    def codegen(context, builder, signature, args):
        c, values = args
        parts = [values] if signature.args[1].product == "float32" else _halves(builder, values)
        for part in parts:
            c = builder.fadd(c, part)
        return c

    return sums(sums, b), codegen


@intrinsic
def fma(typingctx, array, index, b, c):
    """array[index] b + c, for a vector b and sums c."""

    def codegen(context, builder, signature, args):
        scalar = builder.load(address(context, builder, signature.args[0], *args[:2]))
        return _multiply(builder, signature.args[2].product, scalar, args[2], args[3])

    return c(array, types.intp, b, c), codegen


@intrinsic
def zeros(typingctx, lanes):
    """Sums that are 0."""
    kind = Sums(lanes.width)
    return kind(lanes), lambda context, builder, signature, args: _splat(kind.llvm, 0.0)


@intrinsic
def total(typingctx, a, b):
    """a + b, sums."""
    return a(a, b), lambda context, builder, signature, args: builder.fadd(*args)


@intrinsic
def minus(typingctx, a, b):
    """a - b, sums."""
    return a(a, b), lambda context, builder, signature, args: builder.fsub(*args)


@intrinsic
def times(typingctx, a, number):
    """The sums a, times a float32 number."""

    def codegen(context, builder, signature, args):
        return builder.fmul(args[0], _broadcast(builder, args[1], signature.return_type.llvm.count))

    return a(a, types.float32), codegen


# --- a tile of sums ---------------------------------------------------------------------------------------------------

_ELEMENTS = {types.float32: _FLOAT, types.int32: _I32, types.uint16: _I16}


@intrinsic
def tile_rows(typingctx, array, table, start):
    """The addresses of array[table[k]], start <= k < start + ROWS, in registers; ``table`` is int64.

    A table of shape (K / ROWS, ROWS) says that numbers of a row of it follow each other: then one address is enough,
    for which there is always a register.
    """
    runs = table.ndim == 2

    def codegen(context, builder, signature, args):
        array_value, table_value, start_value = args
        result = ir.Constant(signature.return_type.llvm, ir.Undefined)
        for row in range(ROWS):
            if row == 0 or not runs:
                index = builder.add(start_value, ir.Constant(_I64, row))
                index = builder.load(address(context, builder, signature.args[1], table_value, index))
                place = first = address(context, builder, signature.args[0], array_value, index)
            else:
                place = builder.gep(first, [ir.Constant(_I64, row)])
            result = builder.insert_value(result, place, row)
        return result

    return Rows(_ELEMENTS[array.dtype])(array, table, types.intp), codegen


@intrinsic
def tile_fill(typingctx, value):
    """A tile with these sums in every row."""

    def codegen(context, builder, signature, args):
        result = ir.Constant(signature.return_type.llvm, ir.Undefined)
        for row in range(ROWS):
            result = builder.insert_value(result, args[0], row)
        return result

    return Tile(value.llvm.count)(value), codegen


def _each_row(builder, rows, shift, tile, function):
    """The tile whose row k is function(address of row k + shift, row k of ``tile``)."""
    for row in range(ROWS):
        address = builder.gep(builder.extract_value(rows, row), [shift])
        tile = builder.insert_value(tile, function(address, builder.extract_value(tile, row)), row)
    return tile


@intrinsic
def tile_load(typingctx, rows, shift, lanes):
    """Row k is the sums at rows[k] + shift."""

    def codegen(context, builder, signature, args):
        kind = signature.return_type.llvm
        empty = ir.Constant(kind, ir.Undefined)
        return _each_row(builder, *args[:2], empty, lambda address, _: _load(builder, address, kind.element))

    return Tile(lanes.width)(rows, types.intp, lanes), codegen


@intrinsic
def tile_fma(typingctx, rows, shift, b, c):
    """Row k of the tile c, plus the number (or word) at rows[k] + shift times the vector b."""

    def codegen(context, builder, signature, args):
        rows_value, shift_value, b_value, sums = args
        product = signature.args[2].product

        def row(address, c):
            return _multiply(builder, product, builder.load(address), b_value, c)

        return _each_row(builder, rows_value, shift_value, sums, row)

    return c(rows, types.intp, b, c), codegen


@intrinsic
def tile_plus(typingctx, rows, shift, c, first, last):
    """Row k of the tile c, plus the numbers first <= j < last at rows[k] + shift."""

    def codegen(context, builder, signature, args):
        rows_value, shift_value, sums, *bounds = args
        return _each_row(builder, rows_value, shift_value, sums, lambda a, c: _plus(builder, c, a, *bounds))

    return c(rows, types.intp, c, types.intp, types.intp), codegen


@intrinsic
def tile_store(typingctx, rows, shift, c, first, last):
    """Put the numbers first <= j < last of row k of the tile at rows[k] + shift + j."""

    def codegen(context, builder, signature, args):
        rows_value, shift_value, sums, *bounds = args
        for row in range(ROWS):
            address = builder.gep(builder.extract_value(rows_value, row), [shift_value])
            _store(builder, builder.extract_value(sums, row), address, *bounds)
        return context.get_dummy_value()

    return types.void(rows, types.intp, c, types.intp, types.intp), codegen


# --- one number of an array: kernels written once for float32 and bfloat16 (its bits, uint16) -------------------------


@intrinsic
def widen(typingctx, number):
    """float32, from float32 or the bits of a bfloat16."""

    def codegen(context, builder, signature, args):
        if signature.args[0] == types.float32:
            return args[0]
        return builder.bitcast(builder.shl(builder.zext(args[0], _I32), ir.Constant(_I32, 16)), _FLOAT)

    return types.float32(number), codegen


@intrinsic
def narrow(typingctx, value, array):
    """float32 ``value`` as ``array`` stores its numbers."""

    def codegen(context, builder, signature, args):
        return args[0] if signature.return_type == types.float32 else round_to_bf16(builder, args[0])

    return array.dtype(types.float32, array), codegen
