"""nanomr: manifold regularization for locally stable networks, every backward pass by hand.

import nanomr as mr
model = mr.models.small_cnn(seed=0)                      # or mr.load("runs/x/model.safetensors")
logits, cache = model.forward(x)                         # x (N, 32, 32, 3) in [0, 1]; evaluation mode
dx = model.backward(dlogits, cache, param_grads=False)   # input gradient only, same shape as x

Every module is imported when it is first asked for: ``mr.attacks``, ``mr.data``, ``mr.train``, ``mr.verify``, ...
"""

import importlib

from .errors import UserError
from .gradcheck import gradcheck  # at once: else the module of that name would hide it

__version__ = "0.1.0"
_MODULES = (
    "attacks", "backend", "checkpoint", "data", "layers", "losses", "manifold", "methods", "metrics", "models", "ops",
    "optim", "plots", "train", "verify",
)  # fmt: skip
__all__ = ["UserError", "gradcheck", "load", *_MODULES]


def __getattr__(name: str):
    if name == "load":
        return importlib.import_module(f"{__name__}.models").load
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}: it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
