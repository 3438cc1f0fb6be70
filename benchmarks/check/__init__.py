"""The regression check: `make bench-check`, part of what every change must pass.

kernels.py        the inner loops that are watched
ratios.py         their time over that of a copy, in turn with it, against expected_ratios.json
instructions.py   their instructions per element under callgrind, against expected_instructions.json; replay.py runs in there
"""
