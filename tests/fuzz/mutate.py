"""Valid files made invalid: by bytes, and by the structure of the JSON or YAML in them. Everything follows from the generator given."""

from __future__ import annotations

import copy
import json
from random import Random
from typing import Any

DEEP = "@deep@"  # text in a value's place that becomes raw text
RAW = {DEEP: "[" * 200_000, "@deep object@": '{"a":' * 50_000, "@infinity@": "Infinity", "@huge@": "9" * 5000, "@exponent@": "1e999999"}
NASTY: tuple[Any, ...] = (
    0, 1, -1, 2**31, 2**53 + 1, 2**63 - 1, 2**63, 2**64, 10**400, 0.5, -0.0, 1e308, True, False, None,
    "", "x", [], {}, [[]], [None], {"": None}, "..", "../x", "../../etc/passwd", "/etc/passwd", "/", ".", "~", "~root", "a/../b",
    "a\\b", "C:\\x", "\0", "a\0b", "\ud800", "\u202e", "\u00e9" * 300, "x" * 100_000, "a+b", "a@main", "org/name",
    "F32", "BF16", "U8", "F8_E4M3", "F4", "I64", "BOOL", "float32", "nan",
    [0, 0], [0, 8], [8, 0], [2**63], [2**32, 2**32], [0] * 70, [0, 2**62, 2**62], list(range(300)), *RAW,
)  # fmt: skip


def json_text(value: Any, rng: Random) -> bytes:
    """JSON, now and then with a key twice or with odd white space."""
    text = json.dumps(value, ensure_ascii=rng.random() < 0.5)
    for mark, raw in RAW.items():
        text = text.replace(f'"{mark}"', raw)
    if rng.random() < 0.1 and text.startswith("{") and len(text) > 2:
        text = text[:-1] + "," + text[1:]
    if rng.random() < 0.1:
        text += " " * rng.randrange(300)
    return text.encode("utf-8", "surrogatepass")


def structure(value: Any, rng: Random, more: tuple[Any, ...] = ()) -> Any:
    """A copy with one to three nodes replaced, removed, repeated, renamed or exchanged."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        node, key = _pick(value, rng)
        if node is None:
            return rng.choice(NASTY)
        new = copy.deepcopy(rng.choice((*NASTY, *more)))
        what = rng.random()
        if what < 0.5:
            node[key] = new
        elif what < 0.6:
            del node[key]
        elif what < 0.75 and isinstance(node, dict):
            node[rng.choice([str(x) for x in NASTY if not isinstance(x, list | dict)])] = node.pop(key) if rng.random() < 0.5 else new
        elif what < 0.85:
            other, other_key = _pick(value, rng)
            node[key] = copy.deepcopy(other[other_key])
        elif isinstance(node, list):
            node.extend(copy.deepcopy(node) * rng.randint(1, 3))
        else:
            node[key] = [node[key]]
    return value


def _pick(value: Any, rng: Random) -> tuple[Any, Any]:
    """A random place in nested lists and mappings."""
    places, stack = [], [value]
    while stack and len(places) < 10_000:
        node = stack.pop()
        if isinstance(node, dict | list):
            keys = list(node) if isinstance(node, dict) else range(len(node))
            places += [(node, key) for key in keys]
            stack += [node[key] for key in keys]
    return rng.choice(places) if places else (None, None)


def damaged(data: bytes, rng: Random) -> bytes:
    """Bytes changed, removed, put in, cut off or repeated at a few places."""
    result = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(result) + 1)
        count = rng.choice((1, 1, 2, 8, 64))
        what = rng.randrange(6)
        if what == 0 and result:
            result[min(at, len(result) - 1)] = rng.randrange(256)
        elif what == 1:
            del result[at : at + count]
        elif what == 2:
            result[at:at] = rng.randbytes(count)
        elif what == 3:
            del result[at:]
        elif what == 4:
            result[at:at] = result[at : at + count] * rng.randint(1, 5)
        else:
            result[at : at + 8] = rng.choice((0, 1, 2**32, 2**63, 2**64 - 1, 10**8, len(data))).to_bytes(8, "little")
    return bytes(result)
