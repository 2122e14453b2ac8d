"""Screens: every combination of genes scored with a trained model."""

from .keep import Bins
from .merge import merge
from .run import screen, status
from .scorers import Scorer, make_scorer
from .store import ScreenError, Status

__all__ = ["Bins", "Scorer", "ScreenError", "Status", "make_scorer", "merge", "screen", "status"]
