"""Merging on disk: strict lazy reading, planning, streaming writing.

Nothing is imported here: reading headers (`pymerge inspect`) needs no torch. See `format`, `reader`, `plan`, `merge`.
"""
