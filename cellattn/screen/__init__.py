"""Screens: every combination of genes scored with a trained model."""

from .filters import DistanceFilter, LabelFilter, PairFilter, UnmeasuredFilter
from .keep import Bins
from .measured import MeasuredSets, support
from .merge import merge
from .ranks import rank_of, set_of
from .rosters import read_roster
from .run import screen, status
from .scorers import Scorer, make_scorer
from .sets import SetSpace
from .store import ScreenError, Status

__all__ = [
    "Bins",
    "DistanceFilter",
    "LabelFilter",
    "MeasuredSets",
    "PairFilter",
    "Scorer",
    "ScreenError",
    "SetSpace",
    "Status",
    "UnmeasuredFilter",
    "make_scorer",
    "merge",
    "rank_of",
    "read_roster",
    "screen",
    "set_of",
    "status",
    "support",
]
