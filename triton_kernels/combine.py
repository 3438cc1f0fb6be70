"""The fused sparsify-elect-combine kernel: TIES, DARE, task arithmetic and soups of many tensors, one launch per kind of dtype."""

from __future__ import annotations

import triton
import triton.language as tl

from .launch import Table, block_of, launch
from .memory import load_wide, scalar, store_rounded
from .rows import BALANCE_WORD, BASE_WORD, FACTOR_WORD, ROW_HEADER, ROW_MODEL
from .sparsify import infinity_key, kept_by_chance, kept_by_selection, key_type, magnitude_key

__all__ = ["combine", "combine_kernel"]


@triton.jit
def _combine_block(
    table, row, first, n, largest, balance,
    MODELS: tl.constexpr, UNROLL: tl.constexpr, HAS_BASE: tl.constexpr, BASE: tl.constexpr, MODEL: tl.constexpr, OUT: tl.constexpr,
    COMPUTE: tl.constexpr, SPARSIFY: tl.constexpr, RESCALED: tl.constexpr, VOTE: tl.constexpr, VOTE_WEIGHTED: tl.constexpr,
    ZERO_VOTE: tl.constexpr, DIVISOR: tl.constexpr, BALANCE_ONLY: tl.constexpr, ALIGNED: tl.constexpr, MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    lane = tl.arange(0, BLOCK)
    zero = tl.zeros([BLOCK], COMPUTE)
    base = zero
    if HAS_BASE:
        base = load_wide(tl.load(row + BASE_WORD), first, lane, n, BASE, COMPUTE, ALIGNED, MASKED)
    if SPARSIFY == "bernoulli":
        group = (first >> 2) + tl.arange(0, BLOCK // 4)
        tensor = tl.load(row + 3)
        seed = tl.load(row + 5)
    # With an election both sides are added up, and the winner is known at the end: one loop over the models.
    vote, merged, losing, divisor, losing_divisor = zero, zero, zero, zero, zero
    for m in tl.range(0, MODELS, loop_unroll_factor=UNROLL):
        words = row + ROW_HEADER + ROW_MODEL * m
        delta = load_wide(tl.load(words), first, lane, n, MODEL, COMPUTE, ALIGNED, MASKED) - base
        key = magnitude_key(delta)
        largest = tl.maximum(largest, key)
        weight = scalar(tl.load(words + 1), COMPUTE)
        if RESCALED:
            delta = delta * scalar(tl.load(words + FACTOR_WORD), COMPUTE)
        if SPARSIFY == "magnitude" or SPARSIFY == "band":
            kept = kept_by_selection(key, words, first, lane, SPARSIFY == "band")
            delta = tl.where(kept, delta, 0.0)
        elif SPARSIFY == "bernoulli":
            kept = kept_by_chance(group, seed, tensor, m + tl.zeros([1], tl.uint32), tl.load(words + 5), [BLOCK])
            delta = tl.where(kept, delta, 0.0)
        weighted = delta * weight
        if VOTE == "none":
            merged += weighted
            if DIVISOR == "count":
                if SPARSIFY == "none":
                    divisor += 1.0
                else:
                    divisor += tl.where(kept, 1.0, zero)
        else:
            voted = weighted if VOTE_WEIGHTED else delta
            positive = voted > 0
            negative = voted < 0
            if VOTE == "mass":
                vote += voted
            else:
                vote += tl.where(positive, 1.0, zero) - tl.where(negative, 1.0, zero)
            merged += tl.where(positive, weighted, 0.0)
            losing += tl.where(negative, weighted, 0.0)
            if DIVISOR != "none":
                unit = weight if DIVISOR == "weights" else 1.0
                divisor += tl.where(positive, unit, zero)
                losing_divisor += tl.where(negative, unit, zero)
    if BALANCE_ONLY:
        balance += (vote > 0).to(tl.int32) - (vote < 0).to(tl.int32)
    else:
        if VOTE != "none":
            tied = (vote > 0) == (vote < 0)  # zero, or not a number
            if ZERO_VOTE == "majority":
                vote = tl.where(tied, tl.where(tl.load(table + tl.load(row + BALANCE_WORD)) > 0, 1.0, -1.0).to(COMPUTE), vote)
            loses = vote < 0
            merged = tl.where(loses, losing, merged)
            divisor = tl.where(loses, losing_divisor, divisor)
            if ZERO_VOTE == "drop":
                merged = tl.where(tied, 0.0, merged)
        if DIVISOR != "none":
            if VOTE == "none" and DIVISOR == "weights":
                divisor = zero + scalar(tl.load(row + 7), COMPUTE)
            else:
                divisor = tl.where(divisor == 0, 1.0, divisor)
            if COMPUTE == tl.float32:
                merged = tl.div_rn(merged, divisor)
            else:
                merged = merged / divisor  # fp64 division is always the IEEE one
        result = base + merged * scalar(tl.load(row + 6), COMPUTE)
        store_rounded(result, tl.load(row + 2), first, lane, n, OUT, ALIGNED, MASKED)
    return largest, balance


@triton.jit(do_not_specialize=["chunks_at"])
def combine_kernel(
    table,  # int64, see launch.py
    chunks_at,  # where this launch's chunks start
    MODELS: tl.constexpr, UNROLL: tl.constexpr, HAS_BASE: tl.constexpr, BASE: tl.constexpr, MODEL: tl.constexpr, OUT: tl.constexpr,
    COMPUTE: tl.constexpr, SPARSIFY: tl.constexpr, RESCALED: tl.constexpr, VOTE: tl.constexpr, VOTE_WEIGHTED: tl.constexpr,
    ZERO_VOTE: tl.constexpr, DIVISOR: tl.constexpr, BALANCE_ONLY: tl.constexpr, ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Merges a chunk, or with BALANCE_ONLY adds up the balance of its votes; sets the table's flag when a delta is not finite."""
    entry = table + chunks_at + 2 * tl.program_id(0).to(tl.int64)
    row = table + tl.load(entry)
    start = tl.multiple_of(tl.load(entry + 1), BLOCK)
    n = tl.load(row)
    largest = tl.zeros([BLOCK], key_type(COMPUTE))
    balance = tl.zeros([BLOCK], tl.int32)
    for step in range(0, CHUNK, BLOCK):
        first = start + step
        if first + BLOCK <= n:
            largest, balance = _combine_block(
                table, row, first, n, largest, balance, MODELS, UNROLL, HAS_BASE, BASE, MODEL, OUT, COMPUTE, SPARSIFY, RESCALED, VOTE,
                VOTE_WEIGHTED, ZERO_VOTE, DIVISOR, BALANCE_ONLY, ALIGNED, False, BLOCK,
            )  # fmt: skip
        elif first < n:
            largest, balance = _combine_block(
                table, row, first, n, largest, balance, MODELS, UNROLL, HAS_BASE, BASE, MODEL, OUT, COMPUTE, SPARSIFY, RESCALED, VOTE,
                VOTE_WEIGHTED, ZERO_VOTE, DIVISOR, BALANCE_ONLY, ALIGNED, True, BLOCK,
            )  # fmt: skip
    if BALANCE_ONLY:
        tl.atomic_add(table + tl.load(row + BALANCE_WORD), tl.sum(balance).to(tl.int64), sem="relaxed")
    elif tl.max(largest, 0) >= infinity_key(COMPUTE):
        tl.store(table, 1)  # every program that stores, stores the same


def combine(table: Table, *, balance_only: bool = False, **choices) -> None:
    """Launch the kernel for all tensors of a table whose rows are laid out as above.

    A group's key is (base dtype or None, model dtype, result dtype, compute dtype, aligned), Triton's dtypes.
    """
    models = choices["MODELS"]
    for group in table.groups:
        base, model, out, compute, is_aligned = group.key
        launch(
            combine_kernel, group.chunks, table.words.device, table.words, group.chunks_at,
            UNROLL=models if models <= 8 else 4, HAS_BASE=base is not None, BASE=base or model, MODEL=model, OUT=out, COMPUTE=compute,
            BALANCE_ONLY=balance_only, ALIGNED=is_aligned, CHUNK=table.chunk, BLOCK=block_of(compute), **choices,
        )  # fmt: skip
