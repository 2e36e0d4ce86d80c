"""torch.optim.swa_utils, under the name that scripts import it by."""

from torch.optim.swa_utils import *  # noqa: F403
from torch.optim.swa_utils import __all__ as __all__
