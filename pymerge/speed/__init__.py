"""How fast this machine is and how near pymerge comes to it: what `pymerge bench`, `pymerge env` and benchmarks/ have in common."""
