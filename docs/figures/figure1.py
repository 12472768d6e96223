"""Figure 1 of the paper, drawn anew, with a third panel: how H_alpha becomes the Hamming bit as alpha grows.

    python docs/figures/figure1.py [figure1.png]

Needs matplotlib (pip install 'nanomr[plots]'). H_alpha(z, y) = |tanh(alpha z) - tanh(alpha y)|, section 5.3.
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

TARGET = Path(__file__).parent.parent / "img" / "figure1.png"
STYLE = {
    "font.size": 9,
    "axes.titlesize": 12,
    "axes.labelsize": 13,
    "mathtext.fontset": "stix",
    "axes.linewidth": 0.7,
    "figure.dpi": 110,
}


def h_alpha(z, y, alpha):
    return np.abs(np.tanh(alpha * z) - np.tanh(alpha * y))


def surface(axes, alpha=1.0, n=49):
    z, y = (a.ravel() for a in np.meshgrid(*[np.linspace(-3, 3, n)] * 2))
    corner = np.arange(n * n).reshape(n, n)[:-1, :-1].ravel()
    # Two triangles a cell, cut along the diagonal z = y: there lies the crease of H_alpha.
    lower, upper = (corner, corner + 1, corner + n + 1), (corner, corner + n + 1, corner + n)
    triangles = np.concatenate([np.stack(lower, 1), np.stack(upper, 1)])
    axes.plot_trisurf(z, y, h_alpha(z, y, alpha), triangles=triangles, cmap="viridis", linewidth=0, antialiased=False)
    axes.plot([-3, 3], [-3, 3], [0, 0], color="white", lw=1, ls=(0, (4, 3)), zorder=10)
    axes.view_init(elev=34, azim=-68)
    axes.set_box_aspect((1, 1, 0.6), zoom=1.12)
    axes.set(xticks=[-2, 0, 2], yticks=[-2, 0, 2], zticks=[0, 1, 2])
    axes.tick_params(pad=-2)
    axes.set_xlabel(r"$\hat{z}$", labelpad=-4)
    axes.set_ylabel(r"$\hat{y}$", labelpad=-4)
    for axis in (axes.xaxis, axes.yaxis, axes.zaxis):
        axis.set_pane_color("white")
    axes.grid(False)
    axes.set_title(r"$H_\alpha(\hat{z}, \hat{y})$,  $\alpha = 1$", y=1.03)


def contour(axes, alpha=1.0):
    z, y = np.meshgrid(*[np.linspace(-3, 3, 301)] * 2)
    levels = np.arange(0, 2.01, 0.2)
    filled = axes.contourf(z, y, h_alpha(z, y, alpha), levels=levels, cmap="viridis")
    axes.contour(z, y, h_alpha(z, y, alpha), levels=levels[1:-1], colors="white", linewidths=0.5)
    axes.plot([-3, 3], [-3, 3], color="white", lw=1, ls=(0, (4, 3)))
    axes.set(aspect="equal", xticks=range(-3, 4), yticks=range(-3, 4), xlabel=r"$\hat{z}$", ylabel=r"$\hat{y}$")
    axes.set_title(r"contours, $\alpha = 1$")
    bar = axes.figure.colorbar(filled, ax=axes, fraction=0.046, pad=0.04, ticks=[0, 0.5, 1, 1.5, 2])
    bar.outline.set_linewidth(0.7)


def limit(axes, y=-0.5, alphas=(1, 2, 4, 8, 32)):
    z = np.linspace(-2, 2, 1601)
    for alpha, color in zip(alphas, plt.get_cmap("viridis")(np.linspace(0.85, 0.1, len(alphas))), strict=True):
        axes.plot(z, h_alpha(z, y, alpha) / 2, color=color, lw=1.4, label=rf"$\alpha = {alpha}$")
    axes.plot([-2, 0, 0, 2], [0, 0, 1, 1], color="black", lw=1, ls=(0, (3, 2)), label="Hamming bit")
    axes.axvline(y, color="#999999", lw=0.7, ls=":")
    axes.text(y - 0.06, 0.32, rf"$\hat{{y}} = {y}$", color="#666666", ha="right")
    axes.set(xlim=(-2, 2), ylim=(-0.03, 1.06), xticks=range(-2, 3), yticks=[0, 0.5, 1], xlabel=r"$\hat{z}$")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(
        frameon=False,
        fontsize=8,
        loc="upper left",
        bbox_to_anchor=(0.0, 1.0),
        handlelength=1.6,
        borderpad=0,
        labelspacing=0.3,
    )
    axes.set_title(r"$H_\alpha(\hat{z}, \hat{y})\,/\,2$ as $\alpha$ grows")


def draw(target=TARGET) -> Path:
    target = Path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(10.4, 3.3))
        grid = figure.add_gridspec(
            1, 3, width_ratios=(1.1, 1, 1.05), wspace=0.3, left=0.01, right=0.985, bottom=0.15, top=0.88
        )
        surface(figure.add_subplot(grid[0], projection="3d"))
        contour(figure.add_subplot(grid[1]))
        limit(figure.add_subplot(grid[2]))
        figure.savefig(target, dpi=110, metadata={"Software": None})
        plt.close(figure)
    return target


if __name__ == "__main__":
    print(draw(*sys.argv[1:2]))
