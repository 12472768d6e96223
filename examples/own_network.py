"""One's own images and network: trained by manifold regularization, attacked, verified, checked, saved and loaded.

python examples/own_network.py [FOLDER]      # some seconds, once the kernels are compiled
"""

import sys
from pathlib import Path

import numpy as np

import nanomr as mr
from nanomr.layers import Conv2d, Flatten, Linear, Normalize, ReLU
from nanomr.verify.proofs import checker as certificate
from nanomr.verify.proofs import network as certificate_network
from nanomr.verify.running import pipeline


def draw(n, seed):
    """(images (n, 8, 8, 1) uint8, labels (n,)): a bright bar on noise, upright (1) or lying (0)."""
    generator = np.random.default_rng(seed)
    images, labels = generator.integers(0, 60, (n, 8, 8, 1)), generator.integers(0, 2, n)
    for image, label, at in zip(images, labels, generator.integers(1, 6, n), strict=True):
        (image[:, at : at + 2] if label else image[at : at + 2])[:] += 150
    return images.astype(np.uint8), labels


def main(folder: Path, epsilon=16 / 255) -> dict:
    (train, train_labels), (test, test_labels) = draw(512, 0), draw(64, 1)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "bars.npz"  # what `nanomr train --data` reads
    np.savez(file, train_images=train, train_labels=train_labels, test_images=test, test_labels=test_labels)
    model = mr.models.Model(
        {
            "normalize": Normalize((0.25,), (0.25,)),
            "conv": Conv2d(1, 8, 4, stride=2, padding=1),
            "relu1": ReLU(),
            "flatten": Flatten(),
            "fc1": Linear(4 * 4 * 8, 16, image=(4, 4, 8)),
            "relu2": ReLU(),
            "fc2": Linear(16, 2),
        },
        name="bars",
        input_shape=(8, 8, 1),
    )
    config = mr.train.Config(
        model.architecture, "manifold", str(file), epochs=8, batch_size=32, hold_out=64, lr=0.05, clip=1.0,
        eps=epsilon, gamma_i=0.5, gamma_h=20.0, augment=False,
    )  # fmt: skip
    model = mr.train.Trainer(config, mr.data.load(file), folder / "run").run()

    x = mr.metrics.as_float(test)
    _, fooled = mr.attacks.pgd(model, x, test_labels, epsilon, steps=20, restarts=2)
    verifier = pipeline.Verifier(model, pipeline.Settings(epsilon), solver=None)  # bounds only: no solver
    outcomes = verifier.screen(x, test_labels, np.arange(len(x)))
    proved = [outcome for outcome in outcomes if outcome.record["verdict"] == "verified"]
    network = certificate_network.read_network(folder / "run")  # the checker shares no code with the verifier
    for outcome in proved:
        i, proofs = outcome.record["id"], {}
        for name, array in outcome.proof.items():  # "rival/array"
            proofs.setdefault(int(name.split("/")[0]), {})[name.split("/")[1]] = array
        checked = certificate.check_image(network, x[i], int(test_labels[i]), epsilon, proofs)
        assert min(checked.bound.values()) > 0
    again = mr.load(folder / "run")  # the file says which layers there are
    assert np.array_equal(again.forward(x)[0], model.forward(x)[0])
    clean = mr.metrics.accuracy(model, test, test_labels)
    return {"clean": clean, "attacked": float(1 - fooled.mean()), "verified": len(proved) / len(x)}


if __name__ == "__main__":
    print(main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/own_network")))
