"""Measure a Hub folder: features of images, probes with baselines and intervals, accuracy of a classifier, COCO AP."""

from .embed import embed
from .evaluate import evaluate, report
from .features import Features, extract_features
from .instances import evaluate_instances, report_instances

__all__ = [
    "Features",
    "embed",
    "evaluate",
    "evaluate_instances",
    "extract_features",
    "report",
    "report_instances",
]
