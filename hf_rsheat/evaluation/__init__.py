"""Measure a Hub folder: features of images, probes with baselines and intervals, accuracy of a classifier."""

from .embed import embed
from .evaluate import evaluate, report
from .features import Features, extract_features

__all__ = ["Features", "embed", "evaluate", "extract_features", "report"]
