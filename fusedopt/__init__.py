"""Fused optimizers for GPUs (Triton) and CPUs (Numba), in the place of torch.optim: ``import fusedopt as optim``.

What is not fused here is torch's own, under the same name.
"""

import torch.optim
from torch.optim import LBFGS, Optimizer, SparseAdam

from fusedopt import lr_scheduler, swa_utils
from fusedopt.adadelta import Adadelta
from fusedopt.adafactor import Adafactor
from fusedopt.adagrad import Adagrad
from fusedopt.adam import Adam, AdamW
from fusedopt.adamax import Adamax
from fusedopt.asgd import ASGD
from fusedopt.backward import step_in_backward
from fusedopt.clipping import clip_grad_norm_
from fusedopt.early_stopping import EarlyStopping
from fusedopt.flat_state import flatten_state, unflatten_state
from fusedopt.groups import no_decay_groups
from fusedopt.lion import Lion
from fusedopt.memory import Memory, memory
from fusedopt.momentum import Momentum
from fusedopt.nadam import NAdam
from fusedopt.radam import RAdam
from fusedopt.rmsprop import RMSprop
from fusedopt.rprop import Rprop
from fusedopt.sgd import SGD
from fusedopt.swapping import swap_in_optimizer_params_and_state
from fusedopt.warm_up import warmup

__version__ = "0.1.0"

__all__ = [
    "ASGD",
    "LBFGS",
    "SGD",
    "Adadelta",
    "Adafactor",
    "Adagrad",
    "Adam",
    "AdamW",
    "Adamax",
    "EarlyStopping",
    "Lion",
    "Memory",
    "Momentum",
    "NAdam",
    "Optimizer",
    "RAdam",
    "RMSprop",
    "Rprop",
    "SparseAdam",
    "clip_grad_norm_",
    "flatten_state",
    "lr_scheduler",
    "memory",
    "no_decay_groups",
    "step_in_backward",
    "swa_utils",
    "swap_in_optimizer_params_and_state",
    "unflatten_state",
    "warmup",
]

# Newer parts of torch.optim, where this torch has them. Muon is torch's: 94 % of its time goes to products of matrices.
if hasattr(torch.optim, "Muon"):
    from torch.optim import Muon

    __all__ += ["Muon"]
