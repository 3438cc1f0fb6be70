"""The benchmark suite: `make bench` (see docs/benchmarks.md).

plan.py      which cases there are; the only place that chooses
inputs.py    the tensors of a case
methods.py   each method as pymerge has it, what it moves, and what the oracle says of a part of its result
rivals/      the same by others, a file each
streams.*    what the machine's memory gives without arithmetic
verify.py    a result is right, or there is no speed
measure.py   one row: verified, timed in turn with its rivals and with the machine's ceiling
logits.py    rows of the divergences
table.py     results as tables; plots.py as pictures; readme.py as the README's table
__main__.py  the program: each group of cases in a process of its own
"""
