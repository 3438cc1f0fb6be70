"""The words of a row in the table of a merge (launch.py), which selection, norms and the merge itself share.

size, addresses of base and result, tensor id, place of the balance of the votes, seed, scale, divisor without an election; for the
selection: row of the first model, flat index of the first element among what is ranked together, number of the first chunk. Then per model:
address, weight, factor, selection (key, cut), the bound of its draws and the selection that a band leaves out.
"""

import triton.language as tl

__all__ = [
    "BALANCE_WORD", "BASE_WORD", "FACTOR_WORD", "FIRST_CHUNK_WORD", "KEY_WORD", "LARGER_WORD", "OFFSET_WORD", "ROW_HEADER", "ROW_MODEL",
    "SELECTION_WORD",
]  # fmt: skip

BASE_WORD = tl.constexpr(1)
BALANCE_WORD = tl.constexpr(4)
SELECTION_WORD = tl.constexpr(8)
OFFSET_WORD = tl.constexpr(9)
FIRST_CHUNK_WORD = tl.constexpr(10)
ROW_HEADER = tl.constexpr(11)

FACTOR_WORD = tl.constexpr(2)
KEY_WORD = tl.constexpr(3)  # and the cut after it
LARGER_WORD = tl.constexpr(6)  # likewise
ROW_MODEL = tl.constexpr(8)
