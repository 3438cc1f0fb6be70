"""Rounds of post-training: what each stage kept and lost, and merging along the way (docs/pipeline.md)."""

from .monitor import StageMonitor
from .search import Interpolation, wise_ft_search
from .sequential import SequentialMerger

__all__ = ["Interpolation", "SequentialMerger", "StageMonitor", "wise_ft_search"]
