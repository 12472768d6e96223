"""Hold the code that each derivation page describes against numerical derivatives; one line per page.

    python docs/derivations/check.py

"complex" is the complex step, exact to rounding: its errors must stay below 1e-12. "central" is the central
difference, for what has no complex values (a ReLU, running averages): below 1e-6. A larger error raises GradientError.
The last digits differ from machine to machine. All of it is float64, with random upstream gradients.
"""

import numpy as np

from nanomr import layers, losses, manifold, models
from nanomr.attacks import objectives
from nanomr.attacks.wasserstein import _log_transport, lambert_of_exp, project
from nanomr.gradcheck import check_vjp, gradcheck
from nanomr.layers import PairBatch
from nanomr.methods import METHODS, manifold_step
from nanomr.methods.manifold import worse_corners
from nanomr.ops import reference as ops
from nanomr.ops.balls import project_l1
from nanomr.verify.bounds import crown as verifier
from nanomr.verify.chain import Chain
from nanomr.verify.exact import collapsed, split
from nanomr.verify.exact import hull as hulls

BOUNDS = {"complex": 1e-12, "central": 1e-6}


def _normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape)


def _layer(layer, x, method="complex", **options):
    """gradcheck of a layer whose parameters are random: at its initial zeros, errors could hide."""
    for i, (name, value) in enumerate(layer.params.items()):
        layer.params[name] = _normal(*value.shape, seed=i + 1)
    return gradcheck(layer, x, method=method, rtol=BOUNDS[method], **options)


def _function(function, *inputs, method="complex"):
    return gradcheck(function, *inputs, method=method, rtol=BOUNDS[method])


def _vjp(f, vjp, *inputs, method="complex"):
    return check_vjp(f, vjp, inputs, method=method, rtol=BOUNDS[method])


# --- a page each: yield (method, error) -------------------------------------------------------------------------------


def convolution():
    x = _normal(2, 6, 7, 3)
    for kernel, stride, padding in ((3, 1, 1), (4, 2, 1), (5, 2, (1, 2, 1, 2)), (1, 2, 0)):
        yield "complex", _layer(layers.Conv2d(3, 4, kernel, stride, padding), x)
        yield "complex", gather_gemm_error(x, _normal(kernel, kernel, 3, 4, seed=1), stride, padding)


def linear():
    yield "complex", _layer(layers.Linear(5, 4), _normal(3, 5))


def relu():
    yield "central", _layer(layers.ReLU(), _normal(4, 5, 5, 3), "central")


def batchnorm():
    def f(x, gamma, beta):
        mean, var = ops.batchnorm_statistics(x)
        return ops.batchnorm(x, gamma, beta, mean, (var + 1e-5) ** -0.5)

    def vjp(dy):
        mean, var = ops.batchnorm_statistics(x)
        inv_std = (var + 1e-5) ** -0.5
        dgamma, dbeta = ops.batchnorm_parameter_gradient(dy, x, mean, inv_std)
        return ops.batchnorm_backward(dy, x, gamma, mean, inv_std, dgamma, dbeta), dgamma, dbeta

    x, gamma, beta = 3 + 2 * _normal(4, 3, 3, 5), _normal(5, seed=1), _normal(5, seed=2)
    yield "complex", _vjp(f, vjp, x, gamma, beta)
    yield "central", _layer(layers.BatchNorm2d(5), x, "central", train=True)
    yield "central", _layer(layers.BatchNorm2d(5), x, "central", train=False)


def pooling():
    x = _normal(2, 4, 4, 3)
    for layer in (layers.AveragePool2d(2), layers.AveragePool2d(), layers.Flatten(), layers.Normalize([0.5], [0.25])):
        yield "complex", _layer(layer, x)


def cross_entropy():
    labels = np.array([0, 9, 3, 3, 7])
    yield "complex", _function(lambda z: losses.cross_entropy(z, labels), 3 * _normal(5, 10))


def trades():
    yield "complex", _function(losses.kl_divergence, 2 * _normal(5, 10), 2 * _normal(5, 10, seed=1))


def mmc():
    labels = np.array([0, 9, 3, 3, 7])
    yield "complex", _function(lambda z: losses.max_mahalanobis(z, labels), 3 * _normal(5, 10))


def msd():
    y, eps = _normal(3, 4, 4, 2), 5.0

    def value(y):
        return ((y - project_l1(y, eps)) ** 2).sum((1, 2, 3)) / 2

    assert (value(y) > 0).all()  # outside, where there is something to check
    yield "central", _vjp(value, lambda dy: dy[:, None, None, None] * (y - project_l1(y, eps)), y, method="central")


def dlr():
    z, labels = 3 * _normal(20, 10), np.arange(20) % 10
    labels[:5] = z[:5].argmax(1)  # an attack begins with images that are right
    targets = (labels + 1) % 10
    for function in (
        lambda z: objectives.cross_entropy_each(z, labels),
        lambda z: objectives.margin(z, labels),
        lambda z: objectives.dlr(z, labels),
        lambda z: objectives.dlr_targeted(z, labels, targets),
    ):
        gradient = function(z)[1]
        yield "complex", _vjp(lambda z, f=function: f(z)[0], lambda dy, g=gradient: dy[:, None] * g, z)


def intrinsic():
    yield "complex", _function(losses.intrinsic, _normal(5, 10), _normal(5, 10, seed=1))


def hamming():
    z = _normal(4, 3, 3, 2)
    for per_sample in (False, True):

        def value(a, b, per_sample=per_sample):
            return losses.hamming(a, b, 8.0, per_sample)

        def tap(per_sample=per_sample):
            return losses.Hamming(8.0, 100.0, per_sample)

        yield "complex", _function(value, 0.1 * z, 0.1 * _normal(*z.shape, seed=1))
        net = layers.Sequential({"1": layers.ReLU(), "2": layers.AveragePool2d(3), "3": layers.ReLU()})
        yield "central", _layer(net, 0.1 * _normal(6, 3, 3, 2), "central", tap=tap)


def laplacian():
    points, f, constant = _normal(6, 4), _normal(6, 3, seed=1), np.ones((5, 2, 2))
    heat = manifold.heat_kernel(points, 4.0)
    resampled, asymmetric = _normal(5, 2, 3), np.abs(_normal(5, 2, 2, seed=3))
    yield "complex", _function(lambda f: manifold.laplacian(f, heat), f)
    for weights in (asymmetric, constant):
        yield "complex", _function(lambda f, w=weights: manifold.resampled_laplacian(f, w), resampled)
    pair = losses.intrinsic(resampled[:, 0], resampled[:, 1])[0] / (2 * len(resampled))
    yield "complex", abs(manifold.resampled_laplacian(resampled, constant)[0] / pair - 1)


def pair_batch():
    u, v = _normal(2, 5, 5, 3), 0.1 * _normal(2, 5, 5, 3, seed=1)
    weight = _normal(3, 3, 3, 4, seed=2)
    conv = layers.Conv2d(3, 4, 3, 1, 1)

    def convolved(x, rho, weight, bias):
        conv.params.update(weight=weight, bias=bias)
        return conv.forward(PairBatch(x, rho))

    def vjp(dy):
        _, cache = convolved(*inputs)
        conv.grads.update(weight=np.zeros_like(weight), bias=np.zeros(4))
        dx, drho = conv.backward(PairBatch.gradient(dy), cache)
        return dx, drho, conv.grads["weight"], conv.grads["bias"]

    inputs = u, v, weight, _normal(4, seed=3)
    yield "complex", _vjp(lambda *i: convolved(*i)[0].full(), vjp, *inputs)
    # ... and the same numbers as the plain convolution of all 3N images:
    dy = _normal(6, 5, 5, 4, seed=4)
    dw, db = ops.conv2d_weight_gradient(ops.expand_pair(u, v), dy, weight.shape, 1, (1,) * 4)
    _, _, pair_dw, pair_db = vjp(dy)
    yield "complex", max(_relative(pair_dw, dw), _relative(pair_db, db))


def worst_corner():
    net = models.mlp((8, 6, 3), input_shape=(2, 2, 2)).astype(np.float64)
    x, labels = _normal(4, 2, 2, 2), np.arange(4) % 3
    net.weights[...] = weights = _normal(*net.weights.shape, seed=1)
    rho = worse_corners(net, x, labels, 0.1 * np.sign(_normal(*x.shape, seed=2)))

    def step(weights):
        net.weights[...], net.gradients[...] = weights, 0
        return np.array([manifold_step(net, x, labels, rho, 0.5, 20.0, share=0.7)["loss"]])

    def vjp(dy):
        step(weights)
        return (dy[0] * net.gradients.copy(),)

    yield "central", _vjp(step, vjp, weights, method="central")


# --- convolution.md: every pass of a convolution as one sum with three tables of offsets ------------------------------


def gather_gemm(out, source, o, a, b, w):
    """out[o_i + c] += sum_r source[a_i + b_r] w[r, c]: flat ``out`` and ``source``; tables o, a (rows), b (terms)."""
    gathered = source[a[:, None] + b]  # (rows, terms)
    np.add.at(out, o[:, None] + np.arange(w.shape[1]), gathered @ w)


def offsets(*axes):
    """The flat table of all sums of one (start, count, step) per axis: a box's offsets in memory, last axis fastest."""
    table = np.zeros(1, np.int64)
    for start, count, step in axes:
        table = (table[:, None] + start + step * np.arange(count)).ravel()
    return table


def gather_gemm_error(x, w, stride, padding):
    """The largest relative difference between the three passes as gather-GEMMs and ``nanomr.ops.reference``."""
    padding = (padding,) * 4 if isinstance(padding, int) else padding
    (n, h, wd, ci), (kh, kw, _, co), s = x.shape, w.shape, stride
    top, bottom, left, right = padding
    hp, wp = h + top + bottom, wd + left + right
    xp = np.pad(x, ((0, 0), (top, bottom), (left, right), (0, 0)))
    _, ho, wo, _ = ops.conv2d_shape(x.shape, w.shape, s, padding)
    dy = _normal(n, ho, wo, co, seed=9)

    pixels = offsets((0, n, hp * wp * ci), (0, ho, s * wp * ci), (0, wo, s * ci))  # where each window starts
    window = offsets((0, kh, wp * ci), (0, kw, ci), (0, ci, 1))  # what lies in it
    y, dw = np.zeros(n * ho * wo * co), np.zeros(kh * kw * ci * co)
    gather_gemm(y, xp.ravel(), offsets((0, n * ho * wo, co)), pixels, window, w.reshape(-1, co))
    gather_gemm(dw, xp.ravel(), offsets((0, kh * kw * ci, co)), window, pixels, dy.reshape(-1, co))

    dxp = np.zeros(xp.shape)
    for e in range(min(s, kh)):  # the rows of x at e, e + s, e + 2s, ... meet the taps e, e + s, ... only
        for f in range(min(s, kw)):
            phase = w[e::s, f::s]
            th, tw = phase.shape[:2]
            rows, columns = len(range(e, hp, s)), len(range(f, wp, s))
            bottom_zeros, right_zeros = max(rows - ho, 0), max(columns - wo, 0)
            dyp = np.pad(dy, ((0, 0), (th - 1, bottom_zeros), (tw - 1, right_zeros), (0, 0)))
            hq, wq = dyp.shape[1:3]
            o = offsets((0, n, hp * wp * ci), (e * wp * ci, rows, s * wp * ci), (f * ci, columns, s * ci))
            a = offsets((0, n, hq * wq * co), (0, rows, wq * co), (0, columns, co))
            b = offsets(((th - 1) * wq * co, th, -wq * co), ((tw - 1) * co, tw, -co), (0, co, 1))
            gather_gemm(dxp.reshape(-1), dyp.ravel(), o, a, b, phase.transpose(0, 1, 3, 2).reshape(-1, ci))

    return max(
        _relative(y, ops.conv2d(x, w, None, s, padding).ravel()),
        _relative(dw, ops.conv2d_weight_gradient(x, dy, w.shape, s, padding)[0].ravel()),
        _relative(dxp[:, top : top + h, left : left + wd], ops.conv2d_input_gradient(dy, w, s, padding, x.shape)),
    )


def sinkhorn():
    t = 4 * _normal(9)
    w = lambert_of_exp(t)
    yield "central", _vjp(lambert_of_exp, lambda dy: dy * w / (1 + w), t, method="central")

    strength, radius, x = 50.0, 0.05, abs(_normal(1, 4, 4, 2, seed=1))
    x, y = x / x.sum(), x / x.sum() + 0.05 * _normal(*x.shape, seed=2)

    def solve(y):
        return project(x, y, radius, regularization=strength, tolerance=1e-10, iterations=10000)

    def value(y):
        found = solve(y)
        alpha = np.log(x) - _log_transport(found.beta, found.psi)[0]
        entropy = (x * alpha).sum() + (found.images * found.beta).sum() - (found.psi * found.cost).sum()
        return np.array(((found.images - y) ** 2).sum() / 2 + entropy / strength)

    yield "central", _vjp(value, lambda dy: dy * (y - solve(y).images), y, method="central")


def crown():
    net = models.mlp((4, 6, 5, 4, 3), input_shape=(1, 2, 2)).astype(np.float64)
    net.weights[...] = 0.7 * _normal(*net.weights.shape, seed=1)
    chain = Chain(net)
    low = 0.2 * _normal(2, 1, 2, 2, seed=5) - 0.5
    high, owner = low + 1, np.array([0, 0, 1, 1])
    lines, box = [verifier.Lines.around(*z) for z in verifier.crown(chain, low, high)], verifier.Box.between(low, high)
    rows = verifier.margin_rows([0, 0, 1, 1], [1, 2, 0, 2], 3)
    inside = [0.5 + 0.1 * np.tanh(_normal(4, *shape, seed=7)) for shape in chain.relu_shapes]

    def vjp(dy):
        bound = verifier.lower(chain, box, lines, rows, owner, inside)
        gradients, _ = verifier.slope_gradients(chain, box, lines, owner, inside, bound)
        return tuple(dy[:, None] * g for g in gradients)

    def value(*slopes):
        return verifier.lower(chain, box, lines, rows, owner, slopes).value

    assert all(line.unstable.any(1).all() for line in lines)  # else the check says less than it seems
    yield "central", _vjp(value, vjp, *inside, method="central")


def beta_crown():
    net = models.mlp((4, 6, 5, 4, 3), input_shape=(1, 2, 2)).astype(np.float64)
    net.weights[...] = 0.7 * _normal(*net.weights.shape, seed=1)
    chain, n = Chain(net), 4
    low = 0.2 * _normal(1, 1, 2, 2, seed=5) - 0.5
    bounds = verifier.crown(chain, low, low + 1)
    row = verifier.margin_rows([0], [1], 3)
    small = collapsed.collapse(chain, low, low + 1, bounds, row[0])
    signs = np.zeros((n, 15), np.int8)
    signs[:, small.units] = (np.abs(_normal(n, len(small.units), seed=6)) < 0.4) * np.sign(_normal(n, 1, seed=8))
    lines = [
        verifier.Lines.around(np.where(sign > 0, np.maximum(a, 0), a), np.where(sign < 0, np.minimum(b, 0), b))
        for sign, (a, b) in zip(np.split(signs, [6, 11], axis=1), bounds, strict=True)
    ]
    box = verifier.Box(*(np.repeat(x, n, 0) for x in verifier.Box.between(low, low + 1)))
    rows, owner = np.repeat(row, n, 0), np.arange(n)

    def layered(values):
        return np.split(values, [6, 11], axis=1)

    def bound(slopes, betas):
        return verifier.lower(chain, box, lines, rows, owner, layered(slopes), layered(-signs * betas))

    def vjp(dy):
        by_slopes, z = verifier.slope_gradients(chain, box, lines, owner, layered(slopes), bound(slopes, betas))
        return dy[:, None] * np.hstack(by_slopes), dy[:, None] * -signs * np.hstack(z)

    slopes, betas = 0.5 + 0.1 * np.tanh(_normal(n, 15, seed=7)), np.abs(_normal(n, 15, seed=9)) * (signs != 0)
    assert (signs != 0).any(1).all() and all(line.unstable.any() for line in lines)
    yield "central", _vjp(lambda a, b: bound(a, b).value, vjp, slopes, betas, method="central")

    signs, values = signs[:, small.units], np.where(signs == 0, slopes, betas)[:, small.units]
    part = collapsed.backward(small, signs, values)
    gradient = collapsed.gradient(signs, part, collapsed.forward(small, part)[0])
    yield (
        "central",
        _vjp(
            lambda v: collapsed.backward(small, signs, v).bound,
            lambda dy: dy[:, None] * gradient,
            values,
            method="central",
        ),
    )


def _relative(a, b):
    return np.abs(a - b).max() / np.abs(b).max()


def hull():
    net = models.mlp((4, 6, 5, 4, 3), input_shape=(1, 2, 2)).astype(np.float64)
    net.weights[...] = 0.7 * _normal(*net.weights.shape, seed=1)
    chain, low = Chain(net), 0.2 * _normal(1, 1, 2, 2, seed=5) - 0.5
    relus = verifier.crown(chain, low, low + 1)
    small = collapsed.collapse(chain, low, low + 1, relus, verifier.margin_rows([0], [1], 3)[0])
    problem, (u_low, u_high), u = hulls.Problem.of(small, np.full(4, 0.5)), small.ends(relus), len(small.units)
    assert u >= 8 and len(small.layers) == 3
    owners = np.repeat(np.arange(u), 2)
    mask = problem.weight[owners] != 0  # inputs of the unit
    cuts = hulls.Cuts(owners, (0.5 * mask * _normal(2 * u, 4 + u, seed=2)).astype(np.float32))
    lines, box, d = verifier.Lines.around(u_low, u_high), problem.box(u_low, u_high), 4
    tops = hulls.offsets(problem, cuts, u_low, u_high)
    unit = np.hstack([np.zeros((u, d)), np.eye(u)])  # picks a
    brackets = np.vstack([  # each >= 0: rows times v, plus constants
        unit - problem.weight, lines.upper[:, None] * problem.weight - unit,
        cuts.coefficients * problem.scale - unit[cuts.units],
    ])  # fmt: skip
    constants = np.concatenate([-small.bias, lines.upper * small.bias + lines.offset, tops])
    objective = np.append(small.row_image, small.row_units)

    def value(below, chord, weights):
        return hulls.evaluate(problem, cuts, hulls.Duals(below, chord, weights), u_low, u_high).bound

    def vjp(dy, *multipliers):
        c = objective - np.concatenate(multipliers) @ brackets
        v = np.where(c > 0, *box)
        slope = -(brackets @ v + constants)
        alone = small.row_bias - np.concatenate(multipliers) @ constants + c @ v
        assert abs(alone - value(*multipliers)[0]) < 1e-12
        return tuple(dy[0] * part for part in np.split(slope, [u, 2 * u]))

    start = [np.abs(0.3 * _normal(n, seed=seed)) for n, seed in ((u, 3), (u, 4), (2 * u, 6))]
    yield "central", _vjp(value, lambda dy: vjp(dy, *start), *start, method="central")


def input_split():
    rows, constants, radius = _normal(3, 5, seed=1), _normal(3, seed=2), np.abs(_normal(5, seed=3))

    def value(weight):
        row = np.zeros(5)
        constant = split._mix(weight, rows, constants, row)
        return np.array([split._least(row, constant, radius)])

    def vjp(dy, weight):
        return (dy[0] * (constants - rows @ (radius * np.sign(weight @ rows))),)

    start = np.abs(_normal(3, seed=4)) + 0.1
    yield "central", _vjp(value, lambda dy: vjp(dy, start), start, method="central")


def interval():
    chain = {
        "conv": layers.Conv2d(2, 3, 3, 1, 1, bias=False), "bn": layers.BatchNorm2d(3), "relu": layers.ReLU(),
        "pool": layers.AveragePool2d(2), "flatten": layers.Flatten(), "fc": layers.Linear(12, 5),
    }  # fmt: skip
    net = layers.Sequential(chain)
    slots = [(layer, name) for layer in chain.values() for name in layer.params]
    points, radius = _normal(4, 4, 4, 2), np.abs(_normal(2, 4, 4, 2, seed=1))
    params = [_normal(*layer.params[name].shape, seed=i) for i, (layer, name) in enumerate(slots)]

    def f(points, radius, *params):
        for (layer, name), value in zip(slots, params, strict=True):
            layer.params[name] = value
        chain["bn"].buffers = {k: v.astype(float) for k, v in chain["bn"].buffers.items()}
        return tuple(net.forward(layers.Box(points, radius), train=True)[0])

    def vjp(*dy):
        f(points, radius, *params)
        _, cache = net.forward(layers.Box(points, radius), train=True)
        for layer in chain.values():
            layer.grads = {}
        dx = net.backward(layers.Box(*dy), cache)
        return (*dx, *(layer.grads[name] for layer, name in slots))

    yield "central", _vjp(f, vjp, points, radius, *params, method="central")
    labels, r, w = np.array([0, 2, 1]), np.abs(_normal(3, 4)), _normal(4, 3, seed=1)
    yield (
        "central",
        _vjp(
            lambda r, w: losses.rivals_gain(r, w, labels),
            lambda d: losses.rivals_gain_backward(d, r, w, labels), r, w, method="central",
        ),
    )  # fmt: skip


def _bounds_step(method):
    """The loss of a step by all weights at once, some of which are a ReLU layer's."""
    children = {
        "conv1": layers.Conv2d(2, 3, 2, 1, 0, bias=False), "bn": layers.BatchNorm2d(3), "relu1": layers.ReLU(),
        "conv2": layers.Conv2d(3, 2, 2, 1, (1, 0, 0, 1)), "relu2": layers.ReLU(), "flatten": layers.Flatten(),
        "fc1": layers.Linear(8, 5), "relu3": layers.ReLU(), "fc2": layers.Linear(5, 3),
    }  # fmt: skip
    net = models.Model(children, "check", (3, 3, 2))
    METHODS[method].begin(net, np.random.default_rng(0))
    net.astype(np.float64).weights[...] = 0.7 * _normal(net.weights.size, seed=1)
    x, labels = 0.5 + 0.2 * np.tanh(_normal(3, 3, 3, 2, seed=2)), np.array([0, 2, 1])
    now = {"eps": 0.12, "eps_end": 0.2, "ramp": 0.6, **METHODS[method].filled({"kappa": 0.3})}

    def value(w):
        net.weights = w
        return np.asarray(METHODS[method].step(net, x, labels, None, now)["loss"])

    def vjp(dy):
        net.zero_grad()
        value(start)
        return (dy * net.gradients,)

    start = net.weights.copy()
    yield "central", _vjp(value, vjp, start, method="central")


def crown_ibp():
    return _bounds_step("crown-ibp")


def dual():
    return _bounds_step("dual")


def predictor():
    return _bounds_step("predictor")


PAGES = {
    f"{page.__name__}.md": page
    for page in (
        linear, convolution, relu, batchnorm, pooling, cross_entropy, trades, mmc, dlr, msd, sinkhorn, intrinsic,
        hamming, laplacian, pair_batch, worst_corner, crown, beta_crown, hull, input_split, interval, crown_ibp, dual,
        predictor,
    )
}  # fmt: skip


def errors(page) -> dict[str, float]:
    """The worst error of a page, by method."""
    worst = {}
    for method, error in PAGES[page]():
        worst[method] = max(worst.get(method, 0.0), float(error))
    return worst


def line(page) -> str:
    worst = errors(page)
    columns = (f"{worst[m]:.1e}" if m in worst else "-" for m in BOUNDS)
    return f"{page:<20}" + "".join(f"{column:>10}" for column in columns)


if __name__ == "__main__":
    print(f"{'page':<20}" + "".join(f"{method:>10}" for method in BOUNDS))
    for page in PAGES:
        print(line(page))
