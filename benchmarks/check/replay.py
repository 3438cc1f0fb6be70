"""Runs recorded calls of the C++ core under callgrind, without torch: `python replay.py FOLDER` (see instructions.py).

Each call runs once for the code that only a first call runs, and once counted.
"""

import ctypes
import importlib.util
import json
import sys
from pathlib import Path


def main(folder: Path) -> None:
    recorded = json.loads((folder / "calls.json").read_text())
    spec = importlib.util.spec_from_file_location("pymerge._native", recorded["module"])
    core = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(core)
    marks = ctypes.CDLL(str(folder / "marks.so"))
    kept, addresses = [], []
    for i, size in enumerate(recorded["buffers"]):
        memory = (ctypes.c_char * (size + 64))()
        address = -(-ctypes.addressof(memory) // 64) * 64
        ctypes.memmove(address, (folder / f"{i}.bin").read_bytes(), size)
        kept.append(memory)
        addresses.append(address)
    for isa in recorded["isas"]:
        if isa not in core.available_isas():
            continue
        core.use_isa(isa)
        for call in recorded["calls"]:
            function, arguments = getattr(core, call["function"]), given(call["arguments"], addresses)
            function(*arguments)
            marks.start()
            function(*arguments)
            marks.stop(f"{isa}/{call['kernel']}/{call['elements']}".encode())


def given(value, addresses):
    """Arguments as they were: JSON has no tuples, and buffers lie elsewhere now."""
    if isinstance(value, list):
        return [given(x, addresses) for x in value]
    if isinstance(value, dict):
        if set(value) == {"buffer"}:
            return addresses[value["buffer"]]
        if set(value) == {"tuple"}:
            return tuple(given(x, addresses) for x in value["tuple"])
        return {key: given(x, addresses) for key, x in value.items()}
    return value


if __name__ == "__main__":
    main(Path(sys.argv[1]))
