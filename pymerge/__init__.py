"""Merge the weights of models that share a base, fast and exactly.

>>> import torch, pymerge
>>> base, a, b = torch.zeros(3), torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 2.0, 0.0])
>>> pymerge.task_arithmetic(base, [a, b])
tensor([1., 2., 0.])
"""

from importlib import import_module
from typing import TYPE_CHECKING

from ._version import __version__

if TYPE_CHECKING:
    from .checkpoint.adapters import merge_adapters
    from .checkpoint.lora.extract import extract_lora
    from .checkpoint.merge import merge
    from .checkpoint.verify import verify
    from .conventions import Convention, presets
    from .losses import kl_divergence
    from .merge_methods.arcee_fusion import arcee_fusion
    from .merge_methods.breadcrumbs import breadcrumbs, breadcrumbs_ties
    from .merge_methods.dare import dare_linear, dare_ties
    from .merge_methods.della import della, della_linear
    from .merge_methods.ema import EMA, ema_update
    from .merge_methods.greedy_soup import GreedySoup, greedy_soup
    from .merge_methods.karcher import karcher
    from .merge_methods.linear import linear, model_soup
    from .merge_methods.magmax import magmax
    from .merge_methods.model_stock import model_stock
    from .merge_methods.multislerp import multislerp
    from .merge_methods.nearswap import nearswap
    from .merge_methods.nuslerp import nuslerp
    from .merge_methods.ram import ram, ramplus_tl
    from .merge_methods.registry import REQUIRED, Method, Parameter, get_method, methods, register_method
    from .merge_methods.sce import sce
    from .merge_methods.slerp import slerp
    from .merge_methods.task_arithmetic import task_arithmetic
    from .merge_methods.ties import ties
    from .merge_methods.wise_ft import wise_ft
    from .metrics import backward_transfer, forward_transfer
    from .ops import NonFiniteError, backend
    from .replay import ReplayMixer, make_replay_stream

__all__ = [
    "EMA",
    "REQUIRED",
    "Convention",
    "GreedySoup",
    "Method",
    "NonFiniteError",
    "Parameter",
    "ReplayMixer",
    "__version__",
    "arcee_fusion",
    "backend",
    "backward_transfer",
    "breadcrumbs",
    "breadcrumbs_ties",
    "dare_linear",
    "dare_ties",
    "della",
    "della_linear",
    "ema_update",
    "extract_lora",
    "forward_transfer",
    "get_method",
    "greedy_soup",
    "karcher",
    "kl_divergence",
    "linear",
    "magmax",
    "make_replay_stream",
    "merge",
    "merge_adapters",
    "methods",
    "model_soup",
    "model_stock",
    "multislerp",
    "nearswap",
    "nuslerp",
    "presets",
    "ram",
    "ramplus_tl",
    "register_method",
    "sce",
    "slerp",
    "task_arithmetic",
    "ties",
    "verify",
    "wise_ft",
]

# Everything is imported when it is first used, so that `pymerge --help` does not wait for torch.
_HOME = {
    "checkpoint.adapters": ("merge_adapters",),
    "checkpoint.lora.extract": ("extract_lora",),
    "checkpoint.merge": ("merge",),
    "checkpoint.verify": ("verify",),
    "conventions": ("Convention", "presets"),
    "merge_methods.arcee_fusion": ("arcee_fusion",),
    "merge_methods.breadcrumbs": ("breadcrumbs", "breadcrumbs_ties"),
    "merge_methods.dare": ("dare_linear", "dare_ties"),
    "merge_methods.della": ("della", "della_linear"),
    "merge_methods.ema": ("EMA", "ema_update"),
    "merge_methods.greedy_soup": ("GreedySoup", "greedy_soup"),
    "merge_methods.karcher": ("karcher",),
    "merge_methods.linear": ("linear", "model_soup"),
    "merge_methods.magmax": ("magmax",),
    "merge_methods.model_stock": ("model_stock",),
    "merge_methods.multislerp": ("multislerp",),
    "merge_methods.nearswap": ("nearswap",),
    "merge_methods.nuslerp": ("nuslerp",),
    "merge_methods.ram": ("ram", "ramplus_tl"),
    "merge_methods.registry": ("REQUIRED", "Method", "Parameter", "get_method", "methods", "register_method"),
    "merge_methods.sce": ("sce",),
    "merge_methods.slerp": ("slerp",),
    "merge_methods.task_arithmetic": ("task_arithmetic",),
    "merge_methods.ties": ("ties",),
    "merge_methods.wise_ft": ("wise_ft",),
    "losses": ("kl_divergence",),
    "metrics": ("backward_transfer", "forward_transfer"),
    "ops": ("NonFiniteError", "backend"),
    "replay": ("ReplayMixer", "make_replay_stream"),
}
_LAZY = {name: module for module, names in _HOME.items() for name in names}


def __getattr__(name: str):
    if name in _LAZY:
        value = globals()[name] = getattr(import_module(f".{_LAZY[name]}", __name__), name)
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
