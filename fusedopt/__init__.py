"""Fused optimizers for GPUs (Triton) and CPUs (Numba), in the place of torch.optim: ``import fusedopt as optim``.

What is not fused here is torch's own, under the same name.
"""

from torch.optim import (
    ASGD,
    LBFGS,
    Adadelta,
    Adagrad,
    Adamax,
    NAdam,
    Optimizer,
    RAdam,
    RMSprop,
    Rprop,
    SparseAdam,
    swa_utils,
)

from fusedopt import lr_scheduler
from fusedopt.adam import Adam, AdamW
from fusedopt.groups import no_decay_groups
from fusedopt.momentum import Momentum
from fusedopt.sgd import SGD

__version__ = "0.1.0"
