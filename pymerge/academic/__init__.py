"""Classical continual-learning methods, as small correct functions, for comparison and teaching.

Status: academic. None of them is validated at the scale of large language models, where replay, small steps, a KL term and weight averaging
cost less and do better. Importing this module says so once. docs/academic.md has the papers and what published code does differently.
"""

import warnings

from .packnet import PackNet
from .penalties import EWC, MAS, SynapticIntelligence
from .progressive import ProgressiveColumn
from .projection import agem_project, gem_project

__all__ = [
    "EWC",
    "MAS",
    "AcademicMethodWarning",
    "PackNet",
    "ProgressiveColumn",
    "SynapticIntelligence",
    "agem_project",
    "gem_project",
]


class AcademicMethodWarning(UserWarning):
    """These methods are not production-validated."""


warnings.warn(
    "pymerge.academic: these methods are not validated at the scale of production language models; prefer replay, KL and weight averaging "
    "(docs/academic.md)",
    AcademicMethodWarning,
    stacklevel=2,
)
