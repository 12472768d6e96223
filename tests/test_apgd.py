"""Auto-PGD: closed forms, the authors' schedule written out, and where it must beat plain PGD."""

import importlib
from functools import partial
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanomr import models
from nanomr.attacks import apgd, apgd_targeted, fgsm, pgd
from nanomr.attacks.apgd import StepSizes, ascend, checkpoints
from nanomr.attacks.common import Linf, recheck, threat
from nanomr.attacks.objectives import cross_entropy_each, dlr, dlr_targeted
from nanomr.testing.strategies import fewer, seeds

SHAPE = (3, 3, 3)
SIZE = 27
norms = pytest.mark.parametrize("norm", ["linf", "l2"])
APGDS = {
    "ce": apgd,
    "dlr": partial(apgd, loss="dlr"),
    "targeted": apgd_targeted,
}
each = pytest.mark.parametrize("name", APGDS)


def network(seed=0, hidden=(8,), classes=5, dtype=np.float64, scale=6.0, n=20):
    """(model, images, what the model says of them): decisions change within small balls."""
    model = models.mlp((SIZE, *hidden, classes), seed=seed, input_shape=SHAPE).astype(dtype)
    model.weights *= scale
    x = np.clip(np.random.default_rng(seed).uniform(-0.3, 1.3, (n, *SHAPE)), 0, 1).astype(dtype)
    *_, last = model.children.values()
    last.params["bias"] -= model.forward(x)[0].mean(0)
    return model, x, model.forward(x)[0].argmax(1)


# --- closed form: a linear network falls where its margin is below eps times the dual norm of the difference ----------


def linear(seed, classes, margin=4.0, far=0.0):
    """(model, images, labels, W): a linear network, and grey images whose logits lead by ``margin``.

    Classes from the third on are behind by another ``far``, so that there is one rival whatever a loss looks at.
    """
    model, *_ = network(seed, (), classes, scale=200.0)
    w, bias = (model.children["fc1"].params[name] for name in ("weight", "bias"))
    x = np.random.default_rng(seed).uniform(0.45, 0.55, (6, *SHAPE))
    bias -= model.forward(x)[0].mean(0)
    bias[2:] -= far
    labels, rows = model.forward(x)[0].argmax(1), np.arange(len(x))
    for _ in range(5):  # walk to the wanted margin, along the difference to the strongest rival
        gaps = model.forward(x)[0][rows, labels][:, None] - model.forward(x)[0]
        gaps[rows, labels] = np.inf
        away = w.T[labels] - w.T[gaps.argmin(1)]
        x += (((margin - gaps.min(1)) / (away * away).sum(1))[:, None] * away).reshape(x.shape)
    assert 0.2 < x.min() and x.max() < 0.8 and len(set(labels.tolist())) > 1
    return model, x, labels, w


def radii(model, x, labels, w, norm):
    """The exact distance to the nearest other class, (N,)."""
    logits, rows = model.forward(x)[0], np.arange(len(x))
    difference = w.T[None] - w.T[labels][:, None]
    dual = abs(difference).sum(2) if norm == "linf" else (difference**2).sum(2) ** 0.5
    ratio = (logits[rows, labels][:, None] - logits) / np.where(dual > 0, dual, 1)
    ratio[rows, labels] = np.inf
    return ratio.min(1)


LONG_PGD = partial(pgd, step_size=0.5)  # steps of many radii: the default's l2 steps turn too slowly for 1e-4


@norms
@pytest.mark.parametrize("classes", [2, 5, 10])
@pytest.mark.parametrize("attack", [LONG_PGD, fgsm, *APGDS.values()], ids=["pgd", "fgsm", *APGDS])
def test_a_linear_network_falls_at_its_exact_radius(attack, classes, norm):
    needs = {APGDS["dlr"]: 3, APGDS["targeted"]: 4}.get(attack, 2)
    if classes < needs:
        with pytest.raises(ValueError, match=f"apgd.* needs at least {needs} classes, the model has {classes}"):
            attack(*network(classes=classes), 0.1)
        return
    # Untargeted losses climb to the rival that they see; only the targeted one tries them all.
    model, x, labels, w = linear(0, classes, far=0 if attack is apgd_targeted else 100)
    radius = radii(model, x, labels, w, norm)
    assert radius.max() < 0.2
    for i in range(len(x)):
        one = x[i : i + 1], labels[i : i + 1]
        assert not attack(model, *one, radius[i] * (1 - 1e-4), norm=norm)[1][0]
        adversarial, fooled = attack(model, *one, radius[i] * (1 + 1e-4), norm=norm)
        assert fooled[0] and recheck(model, one[0], adversarial, one[1], radius[i] * (1 + 1e-4), norm)[0]


# --- the schedule -----------------------------------------------------------------------------------------------------


def test_checkpoints_of_a_hundred_steps():
    assert checkpoints(100) == [22, 41, 57, 70, 80, 87, 93, 99]


@given(steps=st.integers(1, 300))
def test_checkpoints_of_any_number_of_steps(steps):
    """The authors' counters, run as they stand."""
    k, shrink, least = max(int(0.22 * steps), 1), max(int(0.03 * steps), 1), max(int(0.06 * steps), 1)
    found, counter = [], 0
    for i in range(steps):
        counter += 1
        if counter == k:
            found.append(i + 1)
            k, counter = max(k - shrink, least), 0
    assert checkpoints(steps) == found


def run_schedule(losses, step=1.0):
    """The step sizes after each loss: the first row is the start's, one column for each image."""
    sizes = StepSizes(np.full(losses.shape[1], step), len(losses) - 1)
    return np.array([(sizes.see(row), sizes.step)[1] for row in losses])


def halved_at(losses):
    steps = np.r_[1.0, run_schedule(np.asarray(losses, float)[:, None])[:, 0]]
    assert set(steps[1:] / steps[:-1]) <= {0.5, 1.0}
    return np.flatnonzero(steps[1:] < steps[:-1]).tolist()


def test_steps_are_halved_where_the_loss_has_stopped_rising():
    rising = np.arange(1, 102.0)
    assert halved_at(rising) == []
    # flat: no rises in any window. The first comparison is with 0, so that one rise is counted there: 1 of 22
    assert halved_at(np.ones(101)) == [22, 41, 57, 70, 80, 87, 93, 99]
    # condition 1: at most 0.75 k rises in a window of k. 19 in the second, k = 19: 14 rises halve, 15 do not
    for rises, halvings in ((14, [41]), (15, [])):
        loss = rising.copy()
        loss[23 : 23 + 19 - rises] = loss[22]  # falls or stays
        loss[23 : 23 + 19 - rises] -= np.arange(19 - rises)
        assert sum(loss[23:42] > loss[22:41]) == rises
        assert halved_at(loss) == halvings
    # condition 2: the best loss is as old as the last checkpoint, though the loss rises in more than 3/4 of the steps
    loss = rising.copy()
    loss[22] = 1000
    assert halved_at(loss) == [41, 70, 87, 99]  # not twice in a row
    # ... and it is off at the first checkpoint, where the best may be the start itself
    loss = np.r_[1000, rising[:100]]
    assert halved_at(loss)[0] == 41


def test_the_first_comparison_is_with_zero_as_in_the_authors_code():
    """k = 22: 16 rises halve, 17 do not. The start's own loss plays no part in the count, the sign of the next does."""
    for sign, halved in ((1, False), (-1, True)):
        loss = np.r_[0.0, np.arange(100)] + (1 if sign > 0 else -1000)
        loss[18:23] = loss[17] - np.arange(5)  # 16 rises between iterates 1 and 17, then none
        assert (halved_at(loss)[:1] == [22]) == halved


def literal_schedule(losses):
    """The authors' loop for one image, with its whole history in one table (an oracle, not a style)."""
    steps = len(losses) - 1
    table, step, best = np.zeros(steps), 1.0, losses[0]
    best_last_check, reduced_last_check = best, True
    k, counter, found = max(int(0.22 * steps), 1), 0, [1.0]
    for i in range(steps):
        table[i] = losses[i + 1]
        best = max(best, table[i])
        counter += 1
        if counter == k:
            oscillates = sum(table[i - c] > table[i - c - 1] for c in range(k)) <= 0.75 * k
            reduced_last_check = oscillates or (not reduced_last_check and best_last_check >= best)
            best_last_check = best
            step = step / 2 if reduced_last_check else step
            k, counter = max(k - max(int(0.03 * steps), 1), max(int(0.06 * steps), 1)), 0
        found.append(step)
    return found


@given(seed=seeds, steps=st.sampled_from([7, 30, 100]), drift=st.floats(-0.5, 2))
def test_the_schedule_is_the_authors(seed, steps, drift):
    draw = np.random.default_rng(seed)
    losses = (draw.normal(drift, 1, (steps + 1, 5)).cumsum(0) * draw.choice([-1, 0.01, 1], 5)).round(1)
    expected = np.array([literal_schedule(column) for column in losses.T]).T
    assert np.array_equal(run_schedule(losses), expected)


def test_an_equal_loss_is_no_better():
    sizes = StepSizes(np.ones(3), 100)
    assert sizes.see(np.array([1.0, 1, 1]))[0].tolist() == [True] * 3  # the start counts
    assert sizes.see(np.array([0.0, 1, 2]))[0].tolist() == [False, False, True]


@given(seed=seeds)
def test_an_image_that_leaves_changes_no_other_schedule(seed):
    draw = np.random.default_rng(seed)
    losses = draw.normal(0.8, 1, (101, 6)).cumsum(0)
    whole, leave = run_schedule(losses), np.sort(draw.integers(0, 101, 3))
    sizes, left = StepSizes(np.ones(6), 100), np.arange(6)
    for i, row in enumerate(losses):
        gone = (leave == i).sum()
        if gone:
            kept = np.arange(len(left)) >= gone
            left = left[kept]
            sizes.keep(kept)
        sizes.see(row[left])
        assert np.array_equal(sizes.step, whole[i, left])


# --- the walk ---------------------------------------------------------------------------------------------------------


def literal_run(model, x0, start, y, loss, eps, norm, steps):
    """All iterates of one image's run, written as the authors' loop (with checkpoints that are tested above)."""

    def at(x):
        logits, cache = model.forward(x[None])
        value, d = loss(logits, np.array([y]))
        return value[0], model.backward(d, cache, param_grads=False)[0]

    def inside(x):
        if norm == "linf":
            return np.clip(np.clip(x, x0 - eps, x0 + eps), 0, 1)
        change = x - x0
        length = (change**2).sum() ** 0.5
        return np.clip(x0 + change / (length + 1e-12) * min(eps, length), 0, 1)

    x = old = start
    value, g = at(x)
    values, visited, step, best, best_x, best_g = [value], [x], 2 * eps, value, x, g
    for i in range(steps):
        momentum = x - old
        old, a = x, 0.75 if i > 0 else 1.0
        z = inside(x + step * (np.sign(g) if norm == "linf" else g / ((g**2).sum() ** 0.5 + 1e-12)))
        x = inside(x + (z - x) * a + momentum * (1 - a)) if i > 0 else z
        value, g = at(x)
        values.append(value)
        visited.append(x)
        if value > best:
            best, best_x, best_g = value, x, g
        if i + 1 in checkpoints(steps):
            new = 2 * eps * literal_schedule_of(values, steps)
            if new < step:
                x, g = best_x, best_g
            step = new
    return np.array(visited), step / (2 * eps)


def literal_schedule_of(values, steps):
    """The step after these losses, of a run of ``steps``."""
    sizes = StepSizes(np.ones(1), steps)
    for value in values:
        sizes.see(np.array([value]))
    return sizes.step[0]


@norms
@pytest.mark.parametrize("loss", [cross_entropy_each, dlr])
def test_the_walk_is_the_authors(norm, loss, monkeypatch):
    """Momentum, the way back to the best iterate, ball before box: all 101 iterates of images that are never fooled."""
    eps = {"linf": 0.02, "l2": 0.1}[norm]
    model, x, labels = network(1, (16,), dtype=np.float64)
    ball = threat(norm, eps)
    starts = ball.random_start(x, [np.random.default_rng(i) for i in range(len(x))], edge=True)
    robust = np.flatnonzero(~ascend(model, ball, x, starts, labels, lambda z, at: loss(z, labels[at]), 100)[1])[:8]
    assert len(robust) == 8
    visited, forward = [], model.forward

    def noting(x, wrong_at=()):
        """The forward pass, but the first image of the batch is classified wrongly at these calls."""
        logits, cache = forward(x)
        logits[:1] *= -1 if len(visited) in wrong_at else 1
        visited.append(x.copy())
        return logits, cache

    def run(rows):
        visited.clear()
        ascend(model, ball, x[rows], starts[rows], labels[rows], lambda z, at: loss(z, labels[rows][at]), 100)

    monkeypatch.setattr(model, "forward", partial(noting, wrong_at=(5, 19, 30, 50)))
    run(robust)  # four of the eight leave on the way
    assert [len(visited[i]) for i in (5, 6, 19, 20, 30, 31, 50, 51, 100)] == [8, 7, 7, 6, 6, 5, 5, 4, 4]
    last, robust = visited[-1], robust[4:]
    monkeypatch.setattr(model, "forward", noting)
    run(robust)
    monkeypatch.undo()
    visited = np.stack(visited, 1)
    assert visited.shape[:2] == (4, 101)
    np.testing.assert_allclose(visited[:, -1], last, rtol=0, atol=1e-9)  # whoever else was there
    shrunk = []
    for i, own in zip(robust, visited, strict=True):
        expected, step = literal_run(model, x[i], starts[i], labels[i], loss, eps, norm, 100)
        np.testing.assert_allclose(own, expected, rtol=0, atol=1e-9)
        shrunk.append(step)
    assert min(shrunk) <= 1 / 16  # else nothing went back to its best iterate


@pytest.mark.torch
@norms
@pytest.mark.parametrize("loss", ["ce", "dlr", "dlr-targeted"])
def test_the_authors_own_code_takes_the_same_steps(norm, loss, monkeypatch):
    """From the same starts: the same images fall, and those that do not are led through the same 100 places."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed (pip install torch)")
    theirs = pytest.importorskip("pyautoattack.autopgd_base", reason="pip install --no-deps pyautoattack")
    eps = {"linf": 0.03, "l2": 0.15}[norm]
    model, x, labels = network(1, (16,), classes=6)
    layers = [{k: torch.tensor(v) for k, v in model.children[name].params.items()} for name in ("fc1", "fc2")]
    places = []

    def twin(images):  # our images are NHWC, and its own shape is all that a dense network knows
        places.append(images.detach().numpy().copy())
        h = torch.relu(images.flatten(1) @ layers[0]["weight"] + layers[0]["bias"])
        return h @ layers[1]["weight"] + layers[1]["bias"]

    ball = threat(norm, eps)
    start = ball.random_start(x, [np.random.default_rng(i) for i in range(len(x))], edge=True)
    kind = theirs.APGDAttack_targeted if loss == "dlr-targeted" else theirs.APGDAttack
    attack = kind(twin, norm={"linf": "Linf", "l2": "L2"}[norm], eps=eps, device="cpu")
    attack.loss = loss
    images, target = torch.tensor(x), (-model.forward(x)[0]).argsort(1)[:, 1]
    attack.init_hyperparam(images)
    attack.y_target = torch.tensor(target)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)  # else its step sizes are float32
    try:
        _, robust, _, _ = attack.attack_single_run(images, torch.tensor(labels), x_init=torch.tensor(start))
    finally:
        torch.set_default_dtype(before)
    their_places, their_fooled = np.array(places), ~robust.numpy().astype(bool)

    def objective(logits, rows):
        if loss == "dlr-targeted":
            return dlr_targeted(logits, labels[rows], target[rows])
        return {"ce": cross_entropy_each, "dlr": dlr}[loss](logits, labels[rows])

    _, fooled = ascend(model, ball, x, start, labels, objective, 100)
    assert np.array_equal(fooled, their_fooled) and 4 < fooled.sum() < 17
    left = ~fooled
    ours, forward = [], model.forward
    monkeypatch.setattr(model, "forward", lambda x: (ours.append(x.copy()), forward(x))[1])
    rows = np.flatnonzero(left)
    ascend(model, ball, x[left], start[left], labels[left], lambda z, at: objective(z, rows[at]), 100)
    np.testing.assert_allclose(np.array(ours), their_places[:, left], rtol=0, atol=1e-9)


@norms
@each
def test_results_are_in_ball_and_box_and_the_same_for_any_batch(name, norm):
    eps = {"linf": 0.04, "l2": 0.2}[norm]
    model, x, labels = network(2, dtype=np.float32)
    labels[::6] = (labels[::6] + 1) % 5  # a few that are wrong to begin with
    before = x.copy(), labels.copy(), model.state_dict(), model.gradients.copy()
    calls = []
    options = dict(norm=norm, steps=30, seed=3, **({"restarts": 2} if name != "targeted" else {"targets": 3}))
    adversarial, fooled = APGDS[name](model, x, labels, eps, progress=lambda *a: calls.append(a), **options)
    assert adversarial.dtype == x.dtype and adversarial.shape == x.shape and fooled.dtype == bool
    assert 4 < fooled.sum() < 20 and calls == [(20, 20 - fooled.sum())]
    wrong = model.forward(x)[0].argmax(1) != labels
    assert np.all(fooled[wrong]) and np.array_equal(adversarial[wrong], x[wrong])
    assert np.array_equal(adversarial[~fooled], x[~fooled])
    assert np.array_equal(recheck(model, x, adversarial, labels, eps, norm), fooled)
    # The network's own matrix products round differently in other batches: signs do not show it, l2 steps do.
    tolerance = {"linf": 0, "l2": 1e-5}[norm]
    for size in (7, 1):
        other = APGDS[name](model, x, labels, eps, batch_size=size, **options)
        assert np.array_equal(other[1], fooled)
        np.testing.assert_allclose(other[0], adversarial, atol=tolerance, rtol=0)
    some = np.array([17, 3, 4, 12])  # whoever else is in the call, an image is known by its id
    part = APGDS[name](model, x[some], labels[some], eps, ids=some, **options)
    assert np.array_equal(part[1], fooled[some])
    np.testing.assert_allclose(part[0], adversarial[some], atol=tolerance, rtol=0)
    assert np.array_equal(x, before[0]) and np.array_equal(labels, before[1])
    assert np.array_equal(model.gradients, before[3])
    assert all(np.array_equal(value, before[2][key]) for key, value in model.state_dict().items())


def test_seeds_losses_and_restarts_have_starts_of_their_own(monkeypatch):
    model, x, labels = network(0, dtype=np.float32)
    model.weights *= 0.0
    x, labels = x[:2] * 0 + np.float32(0.5), labels[:2] * 0
    seen, forward = [], model.forward
    monkeypatch.setattr(model, "forward", lambda x: (seen.append(x.copy()), forward(x))[1])
    for seed in (0, 1):
        for run in (partial(apgd, restarts=2), partial(apgd, loss="dlr"), partial(apgd_targeted, targets=2)):
            run(model, x, labels, 0.1, steps=0, seed=seed)
    starts = np.concatenate([s for s in seen if not np.array_equal(s, x)]).reshape(-1, SIZE) - 0.5
    assert len(starts) == 2 * 2 * (2 + 1 + 2) == len(np.unique(starts, axis=0))
    np.testing.assert_allclose(abs(starts).max(1), 0.1, rtol=1e-5)  # one pixel at the edge, in each
    assert np.all((abs(starts) > 0.0999).sum(1) < 3)


@fewer(0.3)
@given(seed=seeds)
def test_more_restarts_or_targets_fool_a_superset_with_the_same_images(seed):
    model, x, labels = network(seed % 1000, dtype=np.float32)
    for attack, option in ((apgd, "restarts"), (APGDS["dlr"], "restarts"), (apgd_targeted, "targets")):
        found = [attack(model, x, labels, 0.04, steps=5, seed=seed, **{option: k}) for k in (1, 2, 4)]
        for (fewer_x, fewer_fooled), (more_x, more_fooled) in pairwise(found):
            assert np.all(more_fooled[fewer_fooled])
            assert np.array_equal(more_x[fewer_fooled], fewer_x[fewer_fooled])


def test_restarts_and_targets_find_more():
    gains = {"restarts": 0, "targets": 0}
    for seed in range(8):
        model, x, labels = network(seed, (24, 24), classes=8, dtype=np.float32)
        for attack, option in ((apgd, "restarts"), (apgd_targeted, "targets")):
            few, many = (attack(model, x, labels, 0.03, steps=1, **{option: k})[1].sum() for k in (1, 6))
            gains[option] += many > few
    assert min(gains.values()) >= 1


def test_targets_are_the_strongest_other_classes_of_the_clean_image(monkeypatch):
    model, x, labels = network(4, classes=6, n=3)
    seen = []
    module = importlib.import_module("nanomr.attacks.apgd")  # the package has a function of that name
    right = module.dlr_targeted

    def noting(logits, labels, targets):
        seen.append(targets.tolist())
        return right(logits, labels, targets)

    monkeypatch.setattr(module, "dlr_targeted", noting)
    rank = (-model.forward(x)[0]).argsort(1)
    assert np.array_equal(rank[:, 0], labels)
    assert not apgd_targeted(model, x, labels, 1e-6, steps=2, targets=3)[1].any()
    assert seen == [rank[:, k].tolist() for k in (1, 2, 3) for _ in range(2)]
    seen.clear()
    apgd_targeted(model, x, labels, 1e-6, steps=1)  # 9 targets by default, but there are 5
    assert seen == [rank[:, k].tolist() for k in range(1, 6)]


@norms
@each
def test_eps_zero_is_the_clean_accuracy(name, norm):
    model, x, labels = network(6, dtype=np.float32)
    labels[:4] = (labels[:4] + 1) % 5
    adversarial, fooled = APGDS[name](model, x, labels, 0.0, norm=norm, steps=4)
    assert np.array_equal(adversarial, x) and np.array_equal(fooled, np.arange(20) < 4)


@each
def test_everything_falls_in_the_whole_box(name):
    model, x, labels = network(7, dtype=np.float32)
    more = {} if name == "targeted" else {"restarts": 5}
    assert APGDS[name](model, x, labels, 1.0, **more)[1].all()


@norms
def test_logits_times_ten_thousand_stop_the_cross_entropy_but_not_the_dlr(norm):
    """Gradient masking: in float32 the cross-entropy's gradient is exactly zero, and its attacks stand still."""
    eps = {"linf": 0.08, "l2": 0.4}[norm]
    model, x, labels = network(8, dtype=np.float32)
    honest = apgd(model, x, labels, eps, norm=norm)[1]
    assert honest.sum() > 12
    *_, last = model.children.values()
    last.params["weight"] *= 1e4
    last.params["bias"] *= 1e4
    masked = abs(cross_entropy_each(model.forward(x)[0], labels)[1]).max(1) == 0
    assert masked.mean() > 0.8
    still = fgsm(model, x, labels, eps, norm=norm)[1] | pgd(model, x, labels, eps, norm=norm, random_start=False)[1]
    assert not still[masked].any()
    for attack in (APGDS["dlr"], apgd_targeted):
        assert attack(model, x, labels, eps, norm=norm)[1][masked & honest].mean() > 0.8


def test_apgd_is_no_weaker_than_pgd_with_its_best_step():
    better = 0
    for seed in range(5):
        model, x, labels = network(seed, (24, 24), dtype=np.float32)
        hand = max(pgd(model, x, labels, 0.03, step_size=s, steps=100)[1].sum() for s in (0.001, 0.003, 0.01))
        found = apgd(model, x, labels, 0.03)[1].sum()
        better += int(found) - int(hand)
    assert better >= -1


def test_bad_arguments_are_one_clear_line():
    model, x, labels = network()
    with pytest.raises(ValueError, match=r"loss must be one of ce, dlr, not 'mse'"):
        apgd(model, x, labels, 0.1, loss="mse")
    with pytest.raises(ValueError, match="norm must be 'linf' or 'l2', not 'l1'"):
        apgd(model, x, labels, 0.1, norm="l1")
    assert Linf(0.1).name == "linf"
    few, x, labels = network(classes=3)
    with pytest.raises(ValueError, match="apgd_targeted needs at least 4 classes, the model has 3"):
        apgd_targeted(few, x, labels, 0.1)


@each
def test_no_images_are_no_error(name):
    model, x, _ = network()
    adversarial, fooled = APGDS[name](model, x[:0], np.empty(0, int), 0.1)
    assert adversarial.shape == (0, *SHAPE) and fooled.shape == (0,)
