"""What the three programs share: a network that fits its images, and a progress bar."""

import hashlib
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from tqdm import tqdm

from .. import checkpoint, metrics, models
from ..backend import to_device, to_numpy
from ..errors import UserError


def weights_file(path: Path) -> Path:
    """The file itself where ``path`` is a run folder."""
    return path / "model.safetensors" if path.is_dir() else path


def trained_on(path: Path) -> str:
    """The data set that a weights file names, if this version has it; else shapes10."""
    name = checkpoint.load_tensors(weights_file(path))[1].get("data")
    return "cifar10" if name == "cifar10" else "shapes10"


def load_network(path: Path, dataset, device: str):
    """(model, {"file", "sha256", "architecture"}), or a UserError when it does not fit the data set's images."""
    path = weights_file(path)
    model = models.load(path, device)
    shape, classes = dataset.test_images.shape[1:], len(dataset.classes)
    if model.input_shape != tuple(shape):
        raise UserError(f"{path} is a network for images of shape {model.input_shape}, not {tuple(shape)}")
    if not np.isfinite(to_numpy(model.weights)).all():
        raise UserError(f"{path}: the weights are not all finite numbers; take another checkpoint")
    logits, _ = model.forward(metrics.as_float(to_device(dataset.test_images[:1], device)))
    if logits.shape[1] < classes:
        raise UserError(f"{path} knows {logits.shape[1]} classes, {dataset.name} has {classes}")
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    return model, {"file": path.name, "sha256": sha256, "architecture": model.architecture}


@contextmanager
def progress(total: int, label: str):
    """A progress bar over images; yields ``advance(done, robust)`` for :func:`nanomr.attacks.pgd`."""
    with tqdm(total=total, desc=label, unit="img", disable=None) as bar:

        def advance(done: int, robust: int):
            bar.set_postfix_str(f"robust so far {robust / done:.2%}")
            bar.update(done - bar.n)

        yield advance
