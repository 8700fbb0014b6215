"""fastgrow: neural networks that grow while they train."""

from . import how, nn, ops, optim, schedule, when, where
from .checkpoint import load, save
from .errors import GrowthError
from .grow import finalize, grow
from .grower import Grower
from .growth_report import GrowthReport, SiteGrowth
from .insert import insert_layer
from .named import name_sites
from .observation import Observation
from .observe import observe
from .plan import Plan, plan
from .report import report
from .reserve import release, reserve
from .sites import Site, Sites
from .solve import Directions
from .trial import find_sites

__version__ = "0.1.0"

__all__ = [
    "Directions",
    "Grower",
    "GrowthError",
    "GrowthReport",
    "Observation",
    "Plan",
    "Site",
    "SiteGrowth",
    "Sites",
    "finalize",
    "find_sites",
    "grow",
    "how",
    "insert_layer",
    "load",
    "name_sites",
    "nn",
    "observe",
    "ops",
    "optim",
    "plan",
    "release",
    "report",
    "reserve",
    "save",
    "schedule",
    "when",
    "where",
]
