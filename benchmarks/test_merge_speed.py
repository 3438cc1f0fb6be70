"""Speed of every method, beside naive torch and beside a copy of the bytes that a merge must move.

    make bench                        all cases, results in benchmarks/results/
    make bench ARGS="-k 'ties and 1M'"

Each round times the baseline (while its time budget lasts), the copy and pymerge in turn, so that a change in the machine's mood meets all
three. A result that is wrong fails the case, and no speed is printed.
"""

from __future__ import annotations

import statistics

import pytest
import torch
from cases import CASES, Weights, check

from pymerge.speed.ceiling import Ceiling, elapsed_ms

SIZES = {"1M": 2**20, "16M": 2**24, "64M": 2**26}
ROUNDS = {"1M": 41, "16M": 15, "64M": 9}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
INPUTS = [("1M", "bf16"), ("16M", "bf16"), ("16M", "fp32"), ("64M", "bf16")]


@pytest.fixture(scope="module", params=INPUTS, ids=lambda p: f"{p[0]}-{p[1]}")
def inputs(request) -> tuple[str, str, Weights]:
    size, dtype = request.param
    return size, dtype, Weights.random(SIZES[size], DTYPES[dtype])


@pytest.mark.timeout(600)
@pytest.mark.parametrize("method", CASES)
def test_merge_speed(inputs, method, benchmark, request, measured_rows):
    size, dtype, weights = inputs
    case = CASES[method]
    weights = case.prepared(weights)
    benchmark.group = f"{size}-{dtype}"
    check(method, weights)

    budget, naive_ms, ceiling = 1e3 * request.config.getoption("--naive-seconds"), [], Ceiling(case.bytes_moved(weights))

    def baseline_and_copy() -> None:
        if not naive_ms or sum(naive_ms) + naive_ms[-1] <= budget:
            naive_ms.append(elapsed_ms(lambda: case.naive(weights)))
        ceiling.round()
        case.ours(weights)  # as warm as the copy when its turn to be timed comes

    benchmark.pedantic(case.ours, args=(weights,), setup=baseline_and_copy, rounds=ROUNDS[size])
    copy_way, copy_ms = ceiling.milliseconds()
    ceiling.close()
    stats = benchmark.stats.stats
    benchmark.extra_info.update(
        method=method,
        elements=size,
        dtype=dtype,
        bytes=ceiling.total_bytes,
        pymerge_ms=1e3 * stats.median,
        naive_ms=statistics.median(naive_ms),
        naive_rounds=len(naive_ms),
        copy_ms=copy_ms,
        copy_way=copy_way,
        spread=stats.iqr / stats.median,
    )
    measured_rows.append(dict(benchmark.extra_info))
