"""Really smaller models: post-hoc slimming, its FLOPs, corrections, and the redundancy report (arXiv 2601.22841)."""

from .flops import flops, relative_compute
from .slim import slim

__all__ = ["flops", "relative_compute", "slim"]
