"""How new units start, one file per method."""

from ..newborns import Newborns, Start
from .base import How
from .firefly import Firefly
from .gradmax import GradMax
from .gradmax_opt import GradMaxOpt
from .net2net import Net2Net
from .random import Random
from .sparkling import Sparkling
from .splitting import Splitting
from .tiny import TINY
from .variance_transfer import VarianceTransfer
from .zero_both import ZeroBoth
from .zero_outgoing import ZeroOutgoing

__all__ = [
    "TINY",
    "Firefly",
    "GradMax",
    "GradMaxOpt",
    "How",
    "Net2Net",
    "Newborns",
    "Random",
    "Sparkling",
    "Splitting",
    "Start",
    "VarianceTransfer",
    "ZeroBoth",
    "ZeroOutgoing",
]
