"""CuPy. The same functions as ``reference``: most of its formulas run as they are, since NumPy hands calls on CuPy
arrays over to CuPy. Convolutions are im2col and a matrix product (cuBLAS): simple, any shape.

Nothing here imports CuPy: it computes where its arguments live, so that tests hold it to the reference without a GPU.
"""

from ..backend import array_module
from .reference import (  # noqa: F401  (offered from here as well)
    average_pool,
    average_pool_backward,
    batchnorm,
    batchnorm_backward,
    batchnorm_parameter_gradient,
    batchnorm_statistics,
    contract_pair,
    conv2d_shape,
    expand_pair,
    linear,
    linear_input_gradient,
    linear_weight_gradient,
    normalize,
    relu,
    relu_backward,
    relu_hamming,
    relu_hamming_backward,
    relu_hamming_pair,
    relu_hamming_pair_backward,
    sgd_update,
)


def _columns(x, kh, kw, stride, padding):
    """im2col: (N Ho Wo, kh kw C), each row the patch that one output pixel sees."""
    xp, (top, bottom, left, right) = array_module(x), padding
    x = xp.pad(x, ((0, 0), (top, bottom), (left, right), (0, 0)))
    n, h, w, c = x.shape
    ho, wo = (h - kh) // stride + 1, (w - kw) // stride + 1
    image, row, column, channel = x.strides
    strides = (image, stride * row, stride * column, row, column, channel)
    patches = xp.lib.stride_tricks.as_strided(x, (n, ho, wo, kh, kw, c), strides)
    return patches.reshape(n * ho * wo, kh * kw * c)


def conv2d(x, w, b, stride, padding):
    shape = conv2d_shape(x.shape, w.shape, stride, padding)
    y = _columns(x, *w.shape[:2], stride, padding) @ w.reshape(-1, shape[3])
    if b is not None:
        y += b
    return y.reshape(shape)


def conv2d_input_gradient(dy, w, stride, padding, x_shape):
    xp, (top, bottom, left, right) = array_module(dy), padding
    (kh, kw, c, c_out), (n, h, wd, _), (ho, wo) = w.shape, x_shape, dy.shape[1:3]
    patches = (dy.reshape(-1, c_out) @ w.reshape(-1, c_out).T).reshape(n, ho, wo, kh, kw, c)
    padded = xp.zeros((n, h + top + bottom, wd + left + right, c), dy.dtype)
    for p in range(kh):
        for q in range(kw):
            padded[:, p : p + stride * ho : stride, q : q + stride * wo : stride] += patches[:, :, :, p, q]
    return padded[:, top : top + h, left : left + wd]


def conv2d_weight_gradient(x, dy, w_shape, stride, padding):
    flat = dy.reshape(-1, w_shape[3])
    return (_columns(x, *w_shape[:2], stride, padding).T @ flat).reshape(w_shape), flat.sum(0)


def crop_flip(images, index, top, left, flip, pad=4):
    xp, (n, (h, w)) = array_module(images), (len(index), images.shape[1:3])
    padded = xp.pad(images[index], ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    column = xp.arange(w)
    rows = top[:, None] + xp.arange(h)
    columns = left[:, None] + xp.where(flip[:, None], w - 1 - column, column)
    crop = padded[xp.arange(n)[:, None, None], rows[:, :, None], columns[:, None, :]]
    return crop * xp.float32(1 / 255)


def corners(words, shape, eps):
    xp, count = array_module(words), 1
    for size in shape:
        count *= size
    bits = ((words[:, None] >> xp.arange(64, dtype=xp.uint64)) & xp.uint64(1)).ravel()[:count]
    return (xp.float32(eps) * (1 - 2 * bits.astype(xp.float32))).reshape(shape)
