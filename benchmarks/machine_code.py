"""Reads what `nvdisasm -c` prints of a kernel: its instructions, and how many of them an element costs."""

from __future__ import annotations

import heapq
import re

__all__ = ["instructions", "shortest_loop", "span"]

_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][^;]*);")
_LABEL = re.compile(r"^(\.L_\w+):")
_TARGET = re.compile(r"^BRA.*`\((\.L_\w+)\)")


def instructions(sass: str) -> list[str]:
    """The instructions without predicates: "LDG.E.128 R4, ..."."""
    found = (_INSTRUCTION.match(line) for line in sass.splitlines())
    return [m[2] for m in found if m and not m[2].startswith("NOP")]


def span(sass: str) -> int:
    """Instructions from the first wide load to the last wide store, 0 where there are none: straight code that loads and stores."""
    code = instructions(sass)
    loads = [i for i, x in enumerate(code) if x.startswith("LDG.E.128")]
    stores = [i for i, x in enumerate(code) if x.startswith("STG.E.128")]
    return stores[-1] - loads[0] + 1 if loads and stores else 0


def shortest_loop(sass: str, load: str) -> int:
    """Instructions of the shortest way around a loop with a `load` such as "LDG.E.128", 0 where there is no such loop.

    The shortest way is that of full blocks: masks and rare cases are jumped over, while what is only predicated counts.
    """
    blocks, labels = _blocks(sass)
    rounds = [_round(blocks, labels, i) for i, (code, *_) in enumerate(blocks) if any(x.startswith(load) for x in code)]
    return min((n for n in rounds if n), default=0)


def _blocks(sass: str) -> tuple[list[tuple[list[str], str | None, bool]], dict[str, int]]:
    """Basic blocks (instructions, label that it may jump to, whether the next block may follow), and which block has a label."""
    blocks, labels, code = [], {}, []
    for line in sass.splitlines():
        if label := _LABEL.match(line):
            if code:
                blocks.append((code, None, True))
                code = []
            labels[label[1]] = len(blocks)
        elif (found := _INSTRUCTION.match(line)) and not found[2].startswith("NOP"):
            code.append(found[2])
            target = _TARGET.match(found[2])
            if target or found[2].startswith(("EXIT", "RET")):
                blocks.append((code, target and target[1], bool(found[1]) or found[2].startswith(("BRA.DIV", "BRA.U"))))
                code = []
    if code:
        blocks.append((code, None, False))
    return blocks, labels


def _round(blocks, labels, start: int) -> int:
    """Instructions on the shortest way from a block back to itself (Dijkstra), 0 where there is none."""
    queue, seen = [(0, start)], set()
    while queue:
        so_far, i = heapq.heappop(queue)
        if i == start and so_far:
            return so_far
        if i in seen or i >= len(blocks):
            continue
        seen.add(i)
        code, target, falls = blocks[i]
        for after in ([labels[target]] if target in labels else []) + ([i + 1] if falls else []):
            heapq.heappush(queue, (so_far + len(code), after))
    return 0
