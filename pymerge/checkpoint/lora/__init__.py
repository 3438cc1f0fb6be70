"""LoRA adapters in PEFT's format: opened, and added to a base's weights while these are read."""

from .adapted import AdaptedCheckpoint
from .adapter import Adapter, LowRank, open_adapter

__all__ = ["AdaptedCheckpoint", "Adapter", "LowRank", "open_adapter"]
