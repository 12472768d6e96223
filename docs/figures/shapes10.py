"""Draw docs/img/shapes10.png: eight samples of each class. Needs matplotlib. ``python docs/figures/shapes10.py``"""

import io
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

from nanomr import shapes10

SAMPLES, ZOOM, GAP, TITLE, DPI = 8, 2, 8, 22, 100  # the last four but DPI in pixels of the picture


def main():
    count, cell = len(shapes10.CLASSES), 32 * ZOOM + GAP
    images, _ = shapes10.generate(SAMPLES * count, shapes10.SEED)
    width, height = count * cell + GAP, SAMPLES * cell + GAP + TITLE
    canvas = np.full((height, width, 3), 255, np.uint8)
    for i, image in enumerate(images):
        row, column = divmod(i, count)  # image i is of class i % 10: a class is a column
        top, left = TITLE + GAP + row * cell, GAP + column * cell
        canvas[top : top + 32 * ZOOM, left : left + 32 * ZOOM] = image.repeat(ZOOM, axis=0).repeat(ZOOM, axis=1)
    figure = plt.figure(figsize=(width / DPI, height / DPI), dpi=DPI)
    figure.figimage(canvas)
    for column, name in enumerate(shapes10.CLASSES):
        x, y = GAP + column * cell + 16 * ZOOM, height - (TITLE + GAP) / 2
        figure.text(x / width, y / height, name, ha="center", va="center", fontsize=10)
    buffer = io.BytesIO()
    figure.savefig(buffer)
    path = Path(__file__).resolve().parents[1] / "img" / "shapes10.png"
    path.parent.mkdir(exist_ok=True)
    # 26 levels a channel instead of 256: a third of the bytes, and the eye does not see it
    picture = np.asarray(Image.open(buffer).convert("RGB"))
    Image.fromarray(((picture.astype(np.uint16) + 5) // 10 * 10).clip(0, 255).astype(np.uint8)).save(
        path, optimize=True
    )


if __name__ == "__main__":
    main()
