"""The merge methods, a file each. Importing this package registers them all for recipes; `registry` lists them."""

from . import dare, linear, passthrough, slerp, task_arithmetic, ties, wise_ft
from .registry import REQUIRED, Method, Parameter, get_method, methods, register_method

__all__ = [
    "REQUIRED",
    "Method",
    "Parameter",
    "dare",
    "get_method",
    "linear",
    "methods",
    "passthrough",
    "register_method",
    "slerp",
    "task_arithmetic",
    "ties",
    "wise_ft",
]
