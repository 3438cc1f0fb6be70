"""Before a merge: do models belong together, how far have they moved, do they get in each other's way? And with data: is the way between
them level, how far have the predictions moved? docs/diagnostics.md has the formulas in one table.
"""

from .behaviour import GradientConflict, composition_error, gradient_conflict, kl_drift
from .drift import Drift, WeightDrift, weight_drift
from .interference import Interference, InterferenceReport, interference_report
from .interpolation import BarrierMatrix, InterpolationCurve, barrier_matrix, interpolate_eval, loss_barrier
from .premises import Finding, MergeDiagnosis, diagnose_merge
from .shared_base import Kinship, SharedBase, check_shared_base
from .spectral import Spectral, spectral_measures
from .statistics import Statistics

__all__ = [
    "BarrierMatrix",
    "Drift",
    "Finding",
    "GradientConflict",
    "Interference",
    "InterferenceReport",
    "InterpolationCurve",
    "Kinship",
    "MergeDiagnosis",
    "SharedBase",
    "Spectral",
    "Statistics",
    "WeightDrift",
    "barrier_matrix",
    "check_shared_base",
    "composition_error",
    "diagnose_merge",
    "gradient_conflict",
    "interference_report",
    "interpolate_eval",
    "kl_drift",
    "loss_barrier",
    "spectral_measures",
    "weight_drift",
]
