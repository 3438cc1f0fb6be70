"""Merge the weights of models that share a base, fast and exactly.

>>> import torch, pymerge
>>> base, a, b = torch.zeros(3), torch.tensor([1.0, 0.0, 0.0]), torch.tensor([0.0, 2.0, 0.0])
>>> pymerge.task_arithmetic(base, [a, b])
tensor([1., 2., 0.])
"""

from importlib import import_module
from typing import TYPE_CHECKING

from ._version import __version__
from .conventions import Convention, presets
from .merge_methods.dare import dare_linear, dare_ties
from .merge_methods.ema import EMA, ema_update
from .merge_methods.greedy_soup import GreedySoup, greedy_soup
from .merge_methods.linear import linear, model_soup
from .merge_methods.registry import REQUIRED, Method, Parameter, get_method, methods, register_method
from .merge_methods.slerp import slerp
from .merge_methods.task_arithmetic import task_arithmetic
from .merge_methods.ties import ties
from .merge_methods.wise_ft import wise_ft
from .ops import NonFiniteError, backend

if TYPE_CHECKING:
    from .checkpoint.merge import merge

__all__ = [
    "EMA",
    "REQUIRED",
    "Convention",
    "GreedySoup",
    "Method",
    "NonFiniteError",
    "Parameter",
    "__version__",
    "backend",
    "dare_linear",
    "dare_ties",
    "ema_update",
    "get_method",
    "greedy_soup",
    "linear",
    "merge",
    "methods",
    "model_soup",
    "presets",
    "register_method",
    "slerp",
    "task_arithmetic",
    "ties",
    "wise_ft",
]

# What needs YAML, safetensors and the like is imported when it is first used.
_LAZY = {"merge": "pymerge.checkpoint.merge"}


def __getattr__(name: str):
    if name in _LAZY:
        value = globals()[name] = getattr(import_module(_LAZY[name]), name)
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
