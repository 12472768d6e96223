"""nanomr: manifold regularization for locally stable networks, every backward pass by hand.

import nanomr as mr
model = mr.models.small_cnn(seed=0)                      # or mr.load("runs/x/model.safetensors")
logits, cache = model.forward(x)                         # x (N, 32, 32, 3) in [0, 1]; evaluation mode
dx = model.backward(dlogits, cache, param_grads=False)   # input gradient only, same shape as x
"""

from . import layers, losses, manifold, methods, models, optim
from .errors import UserError
from .gradcheck import gradcheck
from .models import load

__version__ = "0.1.0"
__all__ = ["UserError", "gradcheck", "layers", "load", "losses", "manifold", "methods", "models", "optim"]
