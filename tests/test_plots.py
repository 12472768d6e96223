"""curves.png, from whatever a log may hold."""

import builtins
import sys

import pytest

from nanomr import plots
from nanomr.methods import METHODS

PNG = b"\x89PNG\r\n\x1a\n"


def record(epoch, **changes):
    return {
        "epoch": epoch, "loss": 2.0 / epoch, "cross_entropy": 1.5 / epoch, "intrinsic": 0.1, "hamming": 1e-5,
        "gradient_norm": 1.0, "accuracy": 0.3 + 0.1 * epoch, "pgd10": 0.1 * epoch, "corner_distance": 3.0,
        "unstable": 0.4, "switching": 7, "dead": 1, "relus": 12, "lr": 0.01 * epoch, "eps": 8 / 255, "gamma_i": 0.4,
        "gamma_h": 9000.0, "images_per_s": 1234.5,
    } | changes  # fmt: skip


LOG = [record(1), record(2), record(3)]


@pytest.fixture
def pyplot():
    module = pytest.importorskip("matplotlib.pyplot")
    yield module
    module.close("all")  # a test that failed may have left one open


@pytest.fixture
def drawn(pyplot, monkeypatch):
    """Keeps the figure: after curves(), drawn() gives {axes title: {label: y data}}."""
    monkeypatch.setattr(pyplot, "close", lambda figure=None: None)

    def lines():
        figure = pyplot.gcf()
        return {
            axes.get_title(): {line.get_label(): list(map(float, line.get_ydata())) for line in axes.lines}
            for axes in figure.axes
        }

    yield lines
    monkeypatch.undo()


def is_picture(path):
    return path.read_bytes().startswith(PNG) and path.stat().st_size > 10_000


def test_curves_writes_a_picture_and_says_where(pyplot, tmp_path):
    path = tmp_path / "curves.png"
    assert plots.curves(LOG, path) == path and is_picture(path)
    assert plots.curves(LOG[:1], str(path)) == path and is_picture(path)
    assert not pyplot.get_fignums()  # closed: a long run draws many


def test_curves_draws_what_the_log_says(drawn, tmp_path):
    plots.curves(LOG, tmp_path / "curves.png")
    axes = drawn()
    assert len(axes) == 5  # the fifth: the schedules' second axis, without a title
    assert axes[""] == {"gamma_i": [0.4] * 3, "gamma_h": [9000.0] * 3}
    found = {label: values for lines in axes.values() for label, values in lines.items()}
    assert found["clean"] == pytest.approx([40, 50, 60])
    assert found["loss"] == pytest.approx([2, 1, 2 / 3]) and found["cross-entropy"] == pytest.approx([1.5, 0.75, 0.5])
    assert found["gamma_i x intrinsic"] == pytest.approx([0.04] * 3)
    assert found["gamma_h x hamming"] == pytest.approx([0.09] * 3)
    assert next(v for k, v in found.items() if k.startswith("unstable")) == pytest.approx([40] * 3)
    assert next(v for k, v in found.items() if k.startswith("switching")) == pytest.approx([100 * 7 / 12] * 3)
    assert next(v for k, v in found.items() if k.startswith("dead")) == pytest.approx([100 / 12] * 3)
    assert next(v for k, v in found.items() if k.startswith("lr")) == pytest.approx([1 / 3, 2 / 3, 1])
    assert "Accuracy on held-out images" in axes
    plots.curves(LOG, tmp_path / "curves.png", held=False)
    assert "Accuracy on training images" in drawn()


KEYS = sorted(set(record(1)) - {"epoch"})


def test_a_null_in_the_log_is_a_gap(pyplot, tmp_path):
    path = tmp_path / "curves.png"
    log = [record(1 + i, **{key: None}) for i, key in enumerate(KEYS)]
    assert plots.curves(log, path) == path and is_picture(path)


def test_nothing_but_nulls_still_draws(pyplot, tmp_path):
    path = tmp_path / "curves.png"
    assert plots.curves([record(e, **dict.fromkeys(KEYS)) for e in (1, 2)], path) == path and is_picture(path)


def test_a_key_that_an_older_log_lacks_is_a_gap(pyplot, tmp_path):
    path = tmp_path / "curves.png"
    log = [record(1 + i) for i in range(len(KEYS))]
    for line, key in zip(log, KEYS, strict=True):
        del line[key]
    assert plots.curves(log, path) == path and is_picture(path)


def test_a_standard_run_has_no_gammas_and_zeros_are_drawn(drawn, tmp_path):
    zeros = dict(gamma_i=0.0, gamma_h=0.0, intrinsic=0.0, hamming=0.0, lr=0.0)
    plots.curves([record(1, **zeros), record(2, **zeros)], tmp_path / "curves.png")
    schedules = next(lines for title, lines in drawn().items() if "chedule" in title)
    assert not any(label.startswith("gamma") for label in schedules)


def test_the_terms_of_other_methods_are_drawn_where_there_are_any(drawn, tmp_path):
    assert set(plots.METHOD_TERMS) == {r for m in METHODS.values() for r in m.reports} - {"intrinsic", "hamming"}
    log = [record(i, interval=2.0 + i, ibp_verified=0.1 * i, intrinsic=None, hamming=None) for i in (1, 2)]
    plots.curves(log, tmp_path / "curves.png")
    assert drawn()["Loss and its terms"].keys() == {"loss", "cross-entropy", "interval (unweighted)"}
    assert drawn()["Loss and its terms"]["interval (unweighted)"] == [3.0, 4.0]
    assert drawn()["Accuracy on held-out images"]["proved by intervals, at the full eps"] == [10.0, 20.0]


def test_without_matplotlib_there_is_no_picture_and_no_error(monkeypatch, tmp_path):
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    real = builtins.__import__

    def no_matplotlib(name, *args, **kwargs):
        if name.partition(".")[0] == "matplotlib":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_matplotlib)
    assert plots.curves(LOG, tmp_path / "curves.png") is None
    assert not (tmp_path / "curves.png").exists()
