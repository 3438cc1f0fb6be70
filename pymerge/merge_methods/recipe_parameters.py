"""Parameters that several methods' recipes have in common, under mergekit's names."""

from __future__ import annotations

from .registry import Parameter

__all__ = ["CONVENTION", "DENSITY", "INT8_MASK", "LAMBDA", "NORMALIZE", "RESCALE", "SEED", "WEIGHT"]

WEIGHT = Parameter("weights", recipe="weight", kind=float, per_model=True, doc="multiplies the model's delta")
DENSITY = Parameter("density", recipe="density", kind=float, default=1.0, per_model=True, doc="fraction of the delta that is kept")
LAMBDA = Parameter("scale", recipe="lambda", kind=float, default=1.0, doc="multiplies the merged delta")
SEED = Parameter("seed", recipe="seed", kind=int, default=0, doc="of the random drops")
INT8_MASK = Parameter("int8_mask", recipe="int8_mask", kind=bool, default=False, doc="accepted; changes no result")
CONVENTION = Parameter("convention", recipe="convention", kind=str, default="mergekit", doc="preset of details, see docs on conventions")
NORMALIZE = Parameter(
    "normalize", recipe="normalize", kind=bool, default=None, doc="divide by what is kept; not given: as the convention has it"
)
RESCALE = Parameter(
    "rescale", recipe="rescale", kind=bool, default=None, doc="make up for what is dropped; not given: as the convention has it"
)
