"""The formulas of ``docs/derivations`` in plain NumPy: any dtype, no tricks. The oracle of ``cpu`` and ``gpu``.

Images are NHWC. ``x`` input, ``z`` pre-activation, ``y`` output, ``dy -> dx, dw, db`` gradients of a scalar loss.
Convolution weights are (kh, kw, C, Cout), linear weights (in, out); ``padding`` is (top, bottom, left, right).
No function changes its arguments, except ``sgd_update`` and ``adamw_update``. ``plus`` (None: nothing) has the
shape of the result and is added to it: a residual sum, which a GPU's kernel does on its way to memory.
"""

import math

import numpy as np

from . import balls


def _sum(result, plus):
    return result if plus is None else result + plus


# --- convolution: docs/derivations/convolution.md ---------------------------------------------------------------------


def conv2d_shape(x_shape, w_shape, stride, padding):
    """(N, Ho, Wo, Cout) of a convolution; ValueError when the kernel does not fit."""
    (n, h, w, c), (kh, kw, c_in, c_out), (top, bottom, left, right) = x_shape, w_shape, padding
    if stride < 1 or min(padding) < 0:
        raise ValueError(f"a convolution takes a stride of at least 1 and no negative padding, not {stride}, {padding}")
    if c != c_in:
        raise ValueError(f"the convolution expects {c_in} channels, the input has {c}")
    ho, wo = (h + top + bottom - kh) // stride + 1, (w + left + right - kw) // stride + 1
    if h + top + bottom < kh or w + left + right < kw:
        raise ValueError(f"a {kh}x{kw} kernel does not fit a {h}x{w} image with padding {padding}")
    return n, ho, wo, c_out


def _taps(kh, kw, ho, wo, stride):
    """For each kernel position (a, b): the slices of the padded image that it meets, one pixel per output pixel."""
    for a in range(kh):
        for b in range(kw):
            yield a, b, (slice(None), slice(a, a + stride * ho, stride), slice(b, b + stride * wo, stride))


def _pad(x, padding):
    top, bottom, left, right = padding
    return np.pad(x, ((0, 0), (top, bottom), (left, right), (0, 0)))


def conv2d(x, w, b, stride, padding, plus=None):
    """y[n,i,j,:] = b + sum over taps (p, q) of x_padded[n, s*i+p, s*j+q, :] @ w[p, q]; ``b`` may be None."""
    _, ho, wo, _ = conv2d_shape(x.shape, w.shape, stride, padding)
    xp = _pad(x, padding)
    y = sum(xp[at] @ w[p, q] for p, q, at in _taps(*w.shape[:2], ho, wo, stride))
    return _sum(y if b is None else y + b, plus)


def conv2d_input_gradient(dy, w, stride, padding, x_shape, plus=None):
    """dx: every output pixel hands its dy back, through w[p, q] transposed, to the pixel it read."""
    top, bottom, left, right = padding
    n, h, wd, c = x_shape
    dxp = np.zeros((n, h + top + bottom, wd + left + right, c), dy.dtype)
    for p, q, at in _taps(*w.shape[:2], *dy.shape[1:3], stride):
        dxp[at] += dy @ w[p, q].T
    return _sum(dxp[:, top : top + h, left : left + wd], plus)


def conv2d_weight_gradient(x, dy, w_shape, stride, padding):
    """(dw, db): dw[p, q] = sum over images and pixels of x_padded^T dy; db = sum of dy."""
    xp, c_out = _pad(x, padding), dy.shape[3]
    flat = dy.reshape(-1, c_out)
    dw = np.empty(w_shape, dy.dtype)
    for p, q, at in _taps(*w_shape[:2], *dy.shape[1:3], stride):
        dw[p, q] = xp[at].reshape(-1, w_shape[2]).T @ flat
    return dw, flat.sum(0)


# --- linear: docs/derivations/linear.md -------------------------------------------------------------------------------


def linear(x, w, b):
    """y = x w + b; x (N, in), w (in, out)."""
    return x @ w if b is None else x @ w + b


def linear_input_gradient(dy, w):
    """dx = dy w^T."""
    return dy @ w.T


def linear_weight_gradient(x, dy, into=None):
    """(dw, db) = (x^T dy, sum of dy over the batch). ``into``: dw is added to it, and it is returned."""
    return _added(x.T @ dy, into), dy.sum(0)


def _added(value, into):
    if into is None:
        return value
    into += value
    return into


# --- ReLU and the Hamming regulariser: docs/derivations/relu.md, hamming.md -------------------------------------------


def relu(z):
    """max(z, 0)."""
    return np.maximum(z, 0)


def relu_backward(dy, z):
    """dy where z > 0, else 0: ReLU'(0) = 0, as in PyTorch."""
    return np.where(z > 0, dy, dy.dtype.type(0))


def relu_hamming(z, alpha):
    """(relu(z), squares) for z = [z0; z+; z-] (3N, ...): squares (N,) = sum (tanh(alpha z+) - tanh(alpha z-))^2."""
    _, plus, minus = np.split(z, 3)
    d = np.tanh(alpha * plus) - np.tanh(alpha * minus)
    return relu(z), (d * d).reshape(len(d), -1).sum(1)


def relu_hamming_backward(dy, z, alpha, weight):
    """dz: ReLU's gradient, plus that of sum_i weight_i squares_i / (2 alpha) with respect to z+ and z-.

    ``weight`` (N,) carries the derivative of the regulariser by each sample's sum of squares, times 2 alpha.
    """
    dz, n = relu_backward(dy, z), len(z) // 3
    t_plus, t_minus = np.tanh(alpha * z[n : 2 * n]), np.tanh(alpha * z[2 * n :])
    scaled = weight.reshape(-1, *[1] * (z.ndim - 1)) * (t_plus - t_minus)
    dz[n : 2 * n] += scaled * (1 - t_plus * t_plus)
    dz[2 * n :] -= scaled * (1 - t_minus * t_minus)
    return dz


def box_around(x, eps, mean=None, std=None):
    """([x; c], r, the sums of r, one for each image): the ball c - r to c + r of radius eps around images x (N, ...),
    within [0, 1]; given a ``std``, what :func:`normalize` makes of it."""
    low, high = np.maximum(x - eps, 0), np.minimum(x + eps, 1)
    points, radius = np.concatenate([x, 0.5 * (low + high)]), 0.5 * (high - low)
    if std is not None:
        points, radius = normalize(points, mean, std), normalize(radius, None, abs(std))
    return points, radius, radius.sum(tuple(range(1, x.ndim)))


def relu_box(points, radius):
    """([relu(x);] centres, radii) of the ReLU of [c - r, c + r]; points (N, ...) = c, or (2N, ...) = [x; c]."""
    clean, c = points[: len(points) - len(radius)], points[len(points) - len(radius) :]
    low, high = relu(c - radius), relu(c + radius)
    return np.concatenate([relu(clean), 0.5 * (low + high)]), 0.5 * (high - low)


def box_sums(points, radius):
    """Of the boxes of :func:`relu_box`, float64 (8,): how many are on (c - r > 0), the sums of c and of c^2 over these;
    the same of those that are off (c + r < 0); the sums of c and of r over all."""
    c = points[len(points) - len(radius) :]
    wide, sums = c.astype(np.float64), []
    for side in (c - radius > 0, c + radius < 0):
        sums += [side.sum(), (wide * side).sum(), (wide * wide * side).sum()]
    return np.stack([*sums, wide.sum(), radius.sum(dtype=np.float64)])


def relu_box_backward(dpoints, dradius, points, radius, gains=None):
    """Its transpose: with a = [c - r > 0] and d = [c + r > 0], dc = ((a + d) dc' + (d - a) dr') / 2, dr likewise.

    ``gains``, six numbers (g0, g1, h0, h1, e, f), adds the gradient of a function of :func:`box_sums`: g0 + g1 c to dc
    of those that are on, h0 + h1 c of those that are off, e to every dc and f to every dr.
    """
    k = len(points) - len(radius)
    c, dc = points[k:], dpoints[k:]
    high = np.where(c + radius > 0, 0.5 * (dc + dradius), dc.dtype.type(0))
    low = np.where(c - radius > 0, 0.5 * (dc - dradius), dc.dtype.type(0))
    dc, dr = low + high, high - low
    if gains is not None:
        on0, on1, off0, off1, every, grown = gains
        on, off = c - radius > 0, c + radius < 0
        dc, dr = dc + np.where(on, on0 + on1 * c, 0) + np.where(off, off0 + off1 * c, 0) + every, dr + grown
    return np.concatenate([relu_backward(dpoints[:k], points[:k]), dc]), dr


def chord(low, high):
    """(upper, offset), both like ``low``: relu(z) <= ``upper`` z + ``offset`` for low <= z <= high. Of an unstable ReLU
    that is the chord, of one that is on (off) the line z (0). ``docs/derivations/crown_ibp.md``."""
    unstable = (low < 0) & (high > 0)
    upper = np.where(unstable, high / np.where(unstable, high - low, 1), (low >= 0).astype(low.dtype))
    return upper, np.where(unstable, -low * upper, 0)


def chord_backward(d_upper, d_offset, low, high):
    """The gradients by (low, high): 0 where the ReLU is stable."""
    unstable = (low < 0) & (high > 0)
    width = np.where(unstable, high - low, 1)
    upper, other, d_upper = high / width, -low / width, d_upper / width
    by_low, by_high = d_upper * upper - d_offset * upper**2, d_upper * other + d_offset * other**2
    return np.where(unstable, by_low, 0), np.where(unstable, by_high, 0)


def lines_down(a, lower, upper, offset):
    """Rows a (N, R, ...) behind a ReLU whose lines (N, ...) are ``lower`` z <= relu(z) <= ``upper`` z + ``offset``:
    those in front of it (N, R, ...), and what bounds below and above collect of the offsets, (N, R) each.
    ``docs/derivations/crown_ibp.md``."""
    positive, negative = np.maximum(a, 0), np.minimum(a, 0)
    below, above = ((part * offset[:, None]).reshape(*a.shape[:2], -1).sum(2) for part in (negative, positive))
    return positive * lower[:, None] + negative * upper[:, None], below, above


def lines_up(z, a, low, high, lower, upper, offset):
    """(points (N, R, ...) behind that ReLU, the gradients (N, ...) by lower, upper and offset): of bounds below and
    above, (N, R), whose gradients are ``low`` and ``high``. z: the points in front of it, which those have been
    multiplied into; a: the rows behind it."""
    low, high = (g.reshape(*g.shape, *(1,) * (a.ndim - 2)) for g in (low, high))
    side = np.where(a > 0, high, np.where(a < 0, low, 0 * low))
    points = np.where(a > 0, lower[:, None], upper[:, None]) * z + side * offset[:, None]
    return points, (np.maximum(a, 0) * z).sum(1), (np.minimum(a, 0) * z).sum(1), (a * side).sum(1)


def scale_down(a, scale, shift):
    """:func:`lines_down` for ``scale`` z + ``shift`` per channel, a batch norm: rows in front of it, what both bounds
    collect of the shift, (N, R)."""
    return a * scale, (a * shift).sum(tuple(range(2, a.ndim)))


def scale_up(z, a, total, scale, shift):
    """:func:`lines_up` for that: points behind it, the gradients (C,) by scale and shift. ``total`` (N, R): the
    gradients by bounds below and above, added."""
    total, channels = total.reshape(*total.shape, *(1,) * (a.ndim - 2)), tuple(range(a.ndim - 1))
    return scale * z + shift * total, (a * z).sum(channels), (a * total).sum(channels)


def lines_reach(a, centre, radius):
    """(least, largest), (N, R): what rows a (N, R, ...) take in a box around ``centre`` (N, ...)."""
    flat = a.reshape(*a.shape[:2], -1)
    middle = np.einsum("nri,ni->nr", flat, centre.reshape(len(centre), -1))  # not by BLAS: see rivals_gain
    width = np.einsum("nri,ni->nr", abs(flat), radius.reshape(len(radius), -1))
    return middle - width, middle + width


def lines_corner(a, low, high, centre, radius):
    """Where in the box those are taken, (N, R, ...), weighted by their gradients ``low`` and ``high`` (N, R) and added:
    what goes up by :func:`lines_up`."""
    low, high = (g.reshape(*g.shape, *(1,) * (a.ndim - 2)) for g in (low, high))
    return (low + high) * centre[:, None] + (high - low) * radius[:, None] * np.sign(a)


# --- input normalisation ----------------------------------------------------------------------------------------------


def normalize(x, mean, std):
    """(x - mean) / std per channel; ``mean`` may be None."""
    return (x if mean is None else x - mean) * (1 / std)


# --- corner pairs x, x + rho, x - rho: docs/derivations/pair_batch.md -------------------------------------------------


def expand_pair(u, v):
    """[u; u + v; u - v] (3N, ...): the 3N batch, from its centre and its difference."""
    return np.concatenate([u, u + v, u - v])


def contract_pair(dy):
    """(du, dv), the transpose of :func:`expand_pair`: du = dy0 + dy+ + dy-, dv = dy+ - dy-."""
    centre, plus, minus = np.split(dy, 3)
    return centre + plus + minus, plus - minus


def relu_hamming_pair(u, v, alpha):
    """:func:`relu_hamming` of [u; u + v; u - v], which is never stored."""
    return relu_hamming(expand_pair(u, v), alpha)


def relu_hamming_pair_backward(dy, u, v, alpha, weight):
    """(du, dv): :func:`relu_hamming_backward` at [u; u + v; u - v], contracted."""
    return contract_pair(relu_hamming_backward(dy, expand_pair(u, v), alpha, weight))


# --- batch normalisation: docs/derivations/batchnorm.md ---------------------------------------------------------------


def _channel_sums(x):
    """Sums over every axis but the last. In float64 at least: a batch has half a million pixels a channel."""
    return x.reshape(-1, x.shape[-1]).sum(0, dtype=np.result_type(x.dtype, np.float64)).astype(x.dtype)


def batchnorm_statistics(x):
    """(mean, var) (C,) over every axis but the last; var is the biased one, as the normalisation uses it."""
    m = x.size // x.shape[-1]
    mean = _channel_sums(x) * (1.0 / m)
    centred = x - mean
    return mean, _channel_sums(centred * centred) * (1.0 / m)


def batchnorm(x, gamma, beta, mean, inv_std):
    """gamma (x - mean) inv_std + beta, per channel: both modes; only where mean and inv_std come from differs."""
    return (x - mean) * (inv_std * gamma) + beta


def batchnorm_parameter_gradient(dy, x, mean, inv_std):
    """(dgamma, dbeta) = (sum of dy x_hat, sum of dy)."""
    return _channel_sums(dy * (x - mean)) * inv_std, _channel_sums(dy)


def batchnorm_backward(dy, x, gamma, mean, inv_std, dgamma, dbeta, plus=None):
    """dx in training mode: mean and variance move with x. gamma inv_std (dy - (dbeta + x_hat dgamma) / m)."""
    m = x.size // x.shape[-1]
    dx = (dy - ((x - mean) * (inv_std * dgamma) + dbeta) * (1.0 / m)) * (gamma * inv_std)
    return _sum(dx, plus)


def scale_channels(x, by, plus=None):
    """x (..., C) times by (C,): the way back through a normalisation by constants."""
    return _sum(x * by, plus)


def batchnorm_relu(x, gamma, beta, mean, inv_std):
    """relu(batchnorm(x)), which others do in one pass."""
    return relu(batchnorm(x, gamma, beta, mean, inv_std))


def batchnorm_relu_hamming(x, gamma, beta, mean, inv_std, alpha):
    """relu_hamming(batchnorm(x)): (y, squares)."""
    return relu_hamming(batchnorm(x, gamma, beta, mean, inv_std), alpha)


def batchnorm_relu_backward(
    dy, x, gamma, beta, mean, inv_std, alpha=None, weight=None, plus=None, train=True, into=None, over=None
):
    """(dx + plus, dgamma, dbeta) of batchnorm_relu, or, with ``alpha`` and ``weight``, of batchnorm_relu_hamming.

    ``into``: two arrays to which dgamma and dbeta are added. Without ``train``, mean and inv_std are constants; then
    dgamma and dbeta are None, unless there is an ``into``. ``over``: makes the dgamma and dbeta that dx follows, the
    batch's, of those of the rows that are here (:meth:`nanomr.parallel.Share.means`).
    """
    z = batchnorm(x, gamma, beta, mean, inv_std)
    dz = relu_backward(dy, z) if alpha is None else relu_hamming_backward(dy, z, alpha, weight)
    if not train and into is None:
        return scale_channels(dz, gamma * inv_std, plus), None, None
    dgamma, dbeta = batchnorm_parameter_gradient(dz, x, mean, inv_std)
    for total, gradient in zip(into or (), (dgamma, dbeta), strict=False):
        total += gradient
    if train:
        moves = over(dgamma, dbeta) if over else (dgamma, dbeta)
        return batchnorm_backward(dz, x, gamma, mean, inv_std, *moves, plus), dgamma, dbeta
    return scale_channels(dz, gamma * inv_std, plus), dgamma, dbeta


def times_sign(x, y, into=None):
    """x sign(y), of one shape: the gradient by y, from that by its absolute values. ``into``: it is added to that."""
    return _added(x * np.sign(y), into)


def rivals_gain(radius, weight, labels):
    """sum_f |W_fk - W_fy| r_f: (N, K), of radius (N, F), weight (F, K) and the labels y. By loops over the classes, and
    einsum: OpenBLAS may say "invalid value" of float32 products that have none, and these are small."""
    gain = np.empty_like(radius, shape=(len(radius), weight.shape[1]))
    for k in range(weight.shape[1]):
        rows = labels == k
        gain[rows] = np.einsum("nf,fk->nk", radius[rows], abs(weight - weight[:, k : k + 1]))
    return gain


def rivals_gain_backward(d_gain, radius, weight, labels):
    """(d_radius, d_weight) of :func:`rivals_gain`."""
    d_radius, d_weight = np.empty_like(radius), np.zeros_like(weight)
    for k in range(weight.shape[1]):
        rows, difference = labels == k, weight - weight[:, k : k + 1]
        d_radius[rows] = np.einsum("nk,fk->nf", d_gain[rows], abs(difference))
        each = np.sign(difference) * np.einsum("nf,nk->fk", radius[rows], d_gain[rows])
        d_weight += each
        d_weight[:, k] -= each.sum(1)
    return d_radius, d_weight


def batchnorm_relu_box(points, radius, gamma, beta, mean, inv_std):
    """:func:`relu_box` of the batch norm of a box, whose radii are scaled by |gamma| inv_std: (points, radii), and
    :func:`box_sums` of what is between."""
    z = batchnorm(points, gamma, beta, mean, inv_std), scale_channels(radius, abs(gamma) * inv_std)
    return *relu_box(*z), box_sums(*z)


def batchnorm_relu_box_backward(
    dpoints, dradius, points, radius, gamma, beta, mean, inv_std, gains=None, train=True, spend=False
):
    """(the gradients by points and radius, dgamma, dbeta) of batchnorm_relu_box; ``gains`` as in
    :func:`relu_box_backward`. With ``train``, mean and variance are those of the images x beside the centres, [x; c],
    and move with them: ``docs/derivations/interval.md``. ``spend``: dpoints and dradius may be overwritten."""
    z = batchnorm(points, gamma, beta, mean, inv_std), scale_channels(radius, abs(gamma) * inv_std)
    dz, dr = relu_box_backward(dpoints, dradius, *z, gains)
    dgamma, dbeta = batchnorm_parameter_gradient(dz, points, mean, inv_std)
    dgamma = dgamma + np.sign(gamma) * _channel_sums(dr * radius) * inv_std
    dx, clean = scale_channels(dz, gamma * inv_std), slice(len(points) - len(radius))
    if train and clean.stop:
        dx[clean] = batchnorm_backward(dz[clean], points[clean], gamma, mean, inv_std, dgamma, dbeta)
    return dx, scale_channels(dr, abs(gamma) * inv_std), dgamma, dbeta


# --- pooling ----------------------------------------------------------------------------------------------------------


def average_pool(x, window):
    """Mean over window x window tiles: (N, H, W, C) -> (N, H / window, W / window, C)."""
    n, h, w, c = x.shape
    return x.reshape(n, h // window, window, w // window, window, c).mean((2, 4))


def average_pool_backward(dy, window):
    """Each pixel of a tile gets dy / window^2."""
    return dy.repeat(window, 1).repeat(window, 2) * (1.0 / (window * window))


# --- attacks ----------------------------------------------------------------------------------------------------------


def linf_bounds(x0, eps):
    """(low, high): the least and the largest numbers of x0's dtype that are within eps of ``x0`` and in [0, 1].

    In real arithmetic: x0 - eps and x0 + eps are rounded inwards. ``x0`` float32 or float64 in [0, 1], eps >= 0.
    """
    return np.maximum(0 - _highest(-x0, eps), 0), np.minimum(_highest(x0, eps), 1)


def _highest(x0, eps):
    """The largest number of x0's dtype that is not above x0 + eps."""
    wide, eps = x0.astype(np.float64), min(float(eps), 4.0)
    total = wide + eps  # rounded; what is missing is a float64 too (Knuth's 2Sum)
    other = total - wide
    missing = (wide - (total - other)) + (eps - other)
    rounded = total.astype(x0.dtype)
    above = (rounded > total) | ((rounded == total) & (missing < 0))
    return np.where(above, np.nextafter(rounded, np.full_like(rounded, -2)), rounded)


def linf_step(x, gradient, size, x0, eps):
    """x + size sign(gradient), then the nearest point in :func:`linf_bounds`. All (N, ...), size (N,)."""
    moved = x + size.reshape(-1, *[1] * (x.ndim - 1)) * np.sign(gradient)
    return np.clip(moved, *linf_bounds(x0, eps))


def _within(x0, exact):
    """x0 + ``exact``, float64, in [0, 1] and in no pixel further from x0 than that: the change and the sum are rounded,
    perhaps outwards, thousands of pixels add up, and what is tiny has few digits."""
    change = exact.astype(x0.dtype)
    change = np.where(abs(change) > abs(exact), np.nextafter(change, np.zeros_like(change)), change)
    moved = x0 + change
    return np.clip(np.where(abs(moved - x0) > abs(change), np.nextafter(moved, x0), moved), 0, 1)


def l2_step(x, gradient, size, x0, eps):
    """x + size gradient / |gradient|_2, then the nearest point at most eps from ``x0``, then the nearest in the box
    [0, 1] (which may lead further inside the ball). All (N, ...), size (N,)."""
    one = (-1, *[1] * (x.ndim - 1))
    largest = abs(gradient).reshape(len(x), -1).max(1)
    unit = gradient / np.where(largest > 0, largest, x.dtype.type(1)).reshape(one)  # tiny ones have a direction
    change = x + unit * (size / np.maximum(_l2(unit), 1e-12).astype(x.dtype)).reshape(one) - x0
    eps = balls.radius_within(eps, x)
    return _within(x0, change * (eps / np.maximum(_l2(change), max(eps, 1e-300))).reshape(one))


def _l2(x):
    flat = x.reshape(len(x), -1).astype(np.float64)  # 3072 float32 squares would lose digits
    return np.sqrt((flat * flat).sum(1))


def l1_step(x, gradient, size, x0, eps, coordinates):
    """x + size / coordinates sign(gradient) in so many coordinates, those with the largest gradient of the ones that
    have room for it in the box, then the nearest point with an l1 distance of at most eps from ``x0``, then the nearest
    in the box. All (N, ...), size (N,). ``docs/derivations/msd.md``."""
    one = (-1, *[1] * (x.ndim - 1))
    each = (size / coordinates).reshape(one)
    worth = np.where(np.where(gradient > 0, 1 - x, x) > each, abs(gradient), 0).reshape(len(x), -1)
    worth = np.where(worth == worth, worth, np.inf)  # NaN shows
    rank = np.argsort(np.argsort(-worth, axis=1), axis=1)
    chosen = ((rank < coordinates) & (worth > 0)).reshape(x.shape)
    moved, eps = x + np.where(chosen, np.sign(gradient), 0) * each, balls.radius_within(eps, x)
    change = balls.project_l1(moved.astype(np.float64) - x0.astype(np.float64), eps)
    norm = abs(change).reshape(len(x), -1).sum(1)  # which the long sums of the projection leave a little beside eps
    return _within(x0, change * (eps / np.maximum(norm, max(eps, 1e-300))).reshape(one))


def plane_step(points, w, b, by_weight):
    """d (N, ...): the way to the plane w z = b, on which each coordinate moves at pace 1, or (``by_weight``) |w|, until
    the plane or its side of the box [0, 1] is reached. points and w (N, ...), b (N,).

    d_i = +-min(t rate_i, room_i), and sum |w_i| min(t rate_i, room_i) = the way to the plane determines t. That sum is
    piecewise linear and concave in t: Newton's method from t = 0 ends at the exact t after a few steps, as the
    coordinates that are at the box stay there.
    """
    shape, dtype, flat = points.shape, points.dtype, (len(points), math.prod(points.shape[1:]))
    points, w = points.reshape(flat), w.reshape(flat)
    scale = np.ldexp(dtype.type(1), np.frexp(abs(w).max(1))[1])  # a power of two: dividing by it rounds nothing, and
    w = w / scale[:, None]  # the squares of tiny gradients do not underflow
    excess = (w * points).sum(1, dtype=np.float64) - b / scale
    towards = -np.sign(w) * np.sign(excess).astype(dtype)[:, None]
    room = np.where(towards > 0, 1 - points, points)
    weight, need = abs(w), abs(excess).astype(dtype)
    rate = weight if by_weight else np.ones_like(weight)
    gain, speed = weight * room, weight * rate
    moving, t, corner = speed > 0, np.zeros_like(need), gain.sum(1) <= need
    rows = np.flatnonzero(~corner)  # those whose t is not final yet
    while len(rows):
        on = moving[rows]
        pace = (on * speed[rows]).sum(1)
        reached = (~on * gain[rows]).sum(1)
        corner[rows] = pace == 0  # reached after all, but for rounding
        t[rows] = np.where(pace > 0, (need[rows] - reached) / np.where(pace > 0, pace, 1), 0)
        still = on & (t[rows, None] * rate[rows] < room[rows])
        moving[rows] = still
        rows = rows[(still != on).any(1)]
    way = np.where(corner[:, None], room, np.minimum(t[:, None] * rate, room))
    return (towards * way).reshape(shape)


# --- optimiser and data -----------------------------------------------------------------------------------------------


def sgd_update(w, g, velocity, lr, momentum, weight_decay):
    """In place, PyTorch's convention: v <- momentum v + (g + weight_decay w); w <- w - lr v."""
    velocity *= momentum
    velocity += g + weight_decay * w
    w -= lr * velocity


def adamw_update(w, g, mean, square, t, lr, beta1, beta2, weight_decay, eps=1e-8):
    """In place, PyTorch's convention, at step t = 1, 2, ...: w <- (1 - lr weight_decay) w; running means
    m <- beta1 m + (1 - beta1) g and v <- beta2 v + (1 - beta2) g^2, which began at 0: m_hat = m / (1 - beta1^t),
    v_hat likewise; w <- w - lr m_hat / (sqrt(v_hat) + eps)."""
    w *= 1 - lr * weight_decay
    mean += (1 - beta1) * (g - mean)
    square += (1 - beta2) * (g * g - square)
    w -= (lr / (1 - beta1**t)) * mean / ((square / (1 - beta2**t)) ** 0.5 + eps)


def norm(x):
    """The l2 norm of a vector."""
    return (x @ x) ** 0.5


def crop_flip(images, index, top, left, flip, pad=4):
    """Float images in [0, 1], (len(index), H, W, C), of uint8 ``images``: padded by ``pad`` black pixels, cropped at
    (top, left) in [0, 2 pad], mirrored where ``flip`` is true."""
    h, w = images.shape[1:3]
    padded = np.pad(images[index], ((0, 0), (pad, pad), (pad, pad), (0, 0)))
    out = np.empty((len(index), *images.shape[1:]), np.float32)
    for i, (t, c, mirrored) in enumerate(zip(top, left, flip, strict=True)):
        crop = padded[i, t : t + h, c : c + w]
        out[i] = crop[:, ::-1] if mirrored else crop
    return out * np.float32(1 / 255)


def corners(words, shape, eps):
    """rho in {+eps, -eps}^shape, float32, one sign per bit of the uint64 ``words``, least significant bit first."""
    bits = np.unpackbits(words.view(np.uint8), bitorder="little", count=int(np.prod(shape)))
    return (np.float32(eps) * (1 - 2 * bits.astype(np.float32))).reshape(shape)
