"""What training forgot: scores of every stage on every task, the numbers of the field computed from them, and a gate for releases.

docs/metrics.md has the formulas in one table.
"""

from .gate import GateReport, ProbeResult, RegressionGate
from .lm_eval import EvalRun, IncomparableRunsError, load_lm_eval
from .matrix import MissingScoreError, ResultMatrix
from .transfer import (
    Metric,
    average_accuracy,
    average_incremental_accuracy,
    backward_transfer,
    forgetting,
    forward_transfer,
    intransigence,
    learning_accuracy,
    normalized_improvement,
    retention,
    worst_case_accuracy,
)

__all__ = [
    "EvalRun",
    "GateReport",
    "IncomparableRunsError",
    "Metric",
    "MissingScoreError",
    "ProbeResult",
    "RegressionGate",
    "ResultMatrix",
    "average_accuracy",
    "average_incremental_accuracy",
    "backward_transfer",
    "forgetting",
    "forward_transfer",
    "intransigence",
    "learning_accuracy",
    "load_lm_eval",
    "normalized_improvement",
    "retention",
    "worst_case_accuracy",
]
