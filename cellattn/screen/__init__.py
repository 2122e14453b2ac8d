"""Screens: every combination of genes scored with a trained model."""

from .scorers import Scorer, make_scorer

__all__ = ["Scorer", "make_scorer"]
