"""SIMD values for Numba: a ``vector`` of floats and a ``tile`` of ROWS vectors, both in registers.

A vector is 16 floats (one AVX-512 register, two AVX or four SSE ones), or 16 len(lanes): ``lanes`` is a tuple whose
length says how many. One float that is broadcast to a wide vector saves a load for each of its parts.
All indices are offsets, in floats, into the array's memory (C-contiguous float32); nothing is checked.
"""

import os

from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba.core import types
from numba.extending import intrinsic, models, register_model


def _has_avx512() -> bool:
    features = os.environ.get("NUMBA_CPU_FEATURES")
    return "+avx512f" in features if features is not None else get_host_cpu_features().get("avx512f", False)


AVX512 = _has_avx512()
WIDTH = 16  # floats in the narrow vector
ROWS = 7 if AVX512 else 4  # accumulators: what leaves registers for the operands, by trial
MAX_LANES = 2 if AVX512 else 1

_I64, _I32, _POINTER = ir.IntType(64), ir.IntType(32), ir.FloatType().as_pointer()


class Vector(types.Type):
    def __init__(self, width):
        self.width, self.llvm = width, ir.VectorType(ir.FloatType(), width)
        super().__init__(name=f"vector{width}")


class Tile(types.Type):
    def __init__(self, width):
        self.width, self.llvm = width, ir.ArrayType(ir.VectorType(ir.FloatType(), width), ROWS)
        super().__init__(name=f"tile{width}")


class Pointers(types.Type):
    llvm = ir.ArrayType(_POINTER, ROWS)

    def __init__(self):
        super().__init__(name="pointers")


@register_model(Vector)
@register_model(Tile)
@register_model(Pointers)
class _Model(models.PrimitiveModel):
    def __init__(self, manager, kind):
        super().__init__(manager, kind, kind.llvm)


def _address(context, builder, array_type, array, index):
    return builder.gep(context.make_array(array_type)(context, builder, array).data, [index])


def _load(builder, address, kind):
    value = builder.load(builder.bitcast(address, kind.as_pointer()))
    value.align = 4
    return value


def _function(builder, name, result, arguments):
    module = builder.module
    return module.globals.get(name) or ir.Function(module, ir.FunctionType(result, arguments), name)


def _broadcast(builder, scalar, width):
    undefined = ir.Constant(ir.VectorType(scalar.type, width), ir.Undefined)
    first = builder.insert_element(undefined, scalar, ir.Constant(_I32, 0))
    return builder.shuffle_vector(first, undefined, ir.Constant(ir.VectorType(_I32, width), [0] * width))


def _fma(builder, scalar, b, c):
    """scalar b + c."""
    kind = b.type
    fma = _function(builder, f"llvm.fma.v{kind.count}f32", kind, [kind] * 3)
    return builder.call(fma, [_broadcast(builder, scalar, kind.count), b, c])


def _store(builder, value, address, first, last):
    """The floats first <= j < last only, float j at address + j."""
    kind, width = value.type, value.type.count
    order = ir.Constant(ir.VectorType(_I64, width), list(range(width)))
    above = builder.icmp_signed(">=", order, _broadcast(builder, first, width))
    mask = builder.and_(above, builder.icmp_signed("<", order, _broadcast(builder, last, width)))
    arguments = [kind, kind.as_pointer(), _I32, mask.type]
    store = _function(builder, f"llvm.masked.store.v{width}f32.p0", ir.VoidType(), arguments)
    builder.call(store, [value, builder.bitcast(address, kind.as_pointer()), ir.Constant(_I32, 4), mask])


@intrinsic
def load(typingctx, array, index, lanes):
    """array[index :], 16 len(lanes) floats."""

    def codegen(context, builder, signature, args):
        return _load(builder, _address(context, builder, signature.args[0], *args[:2]), signature.return_type.llvm)

    return Vector(WIDTH * len(lanes))(array, types.intp, lanes), codegen


@intrinsic
def offset(typingctx, table, index):
    """table[index], int64; unlike Numba's own indexing it does not ask whether the index is negative."""

    def codegen(context, builder, signature, args):
        return builder.load(_address(context, builder, signature.args[0], *args))

    return types.int64(table, types.intp), codegen


@intrinsic
def store(typingctx, array, index, value, first, last):
    """array[index + j] = float j of ``value``, for first <= j < last."""

    def codegen(context, builder, signature, args):
        _store(builder, args[2], _address(context, builder, signature.args[0], *args[:2]), *args[3:])
        return context.get_dummy_value()

    return types.void(array, types.intp, value, types.intp, types.intp), codegen


@intrinsic
def add(typingctx, a, b):
    """a + b."""
    return a(a, b), lambda context, builder, signature, args: builder.fadd(*args)


@intrinsic
def fma(typingctx, array, index, b, c):
    """array[index] b + c, for a vector b and an accumulator c."""

    def codegen(context, builder, signature, args):
        scalar = builder.load(_address(context, builder, signature.args[0], *args[:2]))
        return _fma(builder, scalar, args[2], args[3])

    return c(array, types.intp, b, c), codegen


@intrinsic
def tile_rows(typingctx, array, table, start):
    """The addresses of array[table[k]], start <= k < start + ROWS, in registers; ``table`` is int64."""

    def codegen(context, builder, signature, args):
        array_value, table_value, start_value = args
        result = ir.Constant(Pointers.llvm, ir.Undefined)
        for row in range(ROWS):
            index = builder.add(start_value, ir.Constant(_I64, row))
            index = builder.load(_address(context, builder, signature.args[1], table_value, index))
            address = _address(context, builder, signature.args[0], array_value, index)
            result = builder.insert_value(result, address, row)
        return result

    return Pointers()(array, table, types.intp), codegen


@intrinsic
def tile_fill(typingctx, value):
    """A tile with this vector in every row."""

    def codegen(context, builder, signature, args):
        result = ir.Constant(signature.return_type.llvm, ir.Undefined)
        for row in range(ROWS):
            result = builder.insert_value(result, args[0], row)
        return result

    return Tile(value.width)(value), codegen


@intrinsic
def tile_load(typingctx, rows, shift, lanes):
    """Row k is the vector at rows[k] + shift."""

    def codegen(context, builder, signature, args):
        kind = signature.return_type.llvm
        result = ir.Constant(kind, ir.Undefined)
        for row in range(ROWS):
            value = _load(builder, builder.gep(builder.extract_value(args[0], row), [args[1]]), kind.element)
            result = builder.insert_value(result, value, row)
        return result

    return Tile(WIDTH * len(lanes))(rows, types.intp, lanes), codegen


@intrinsic
def tile_fma(typingctx, rows, shift, b, c):
    """Row k of the tile c, plus the number at rows[k] + shift times the vector b."""

    def codegen(context, builder, signature, args):
        rows_value, shift_value, b_value, result = args
        for row in range(ROWS):
            scalar = builder.load(builder.gep(builder.extract_value(rows_value, row), [shift_value]))
            value = _fma(builder, scalar, b_value, builder.extract_value(result, row))
            result = builder.insert_value(result, value, row)
        return result

    return c(rows, types.intp, b, c), codegen


@intrinsic
def tile_store(typingctx, rows, shift, c, first, last):
    """Put the floats first <= j < last of row k of the tile at rows[k] + shift + j."""

    def codegen(context, builder, signature, args):
        rows_value, shift_value, c_value, *bounds = args
        for row in range(ROWS):
            address = builder.gep(builder.extract_value(rows_value, row), [shift_value])
            _store(builder, builder.extract_value(c_value, row), address, *bounds)
        return context.get_dummy_value()

    return types.void(rows, types.intp, c, types.intp, types.intp), codegen
