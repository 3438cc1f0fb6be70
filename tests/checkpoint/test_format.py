"""Every way in which a safetensors file can be malformed is an error that names it; every good file is read as safetensors reads it."""

import json
import os

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from pymerge.checkpoint.dtypes import BITS
from pymerge.checkpoint.format import MAX_HEADER_BYTES, CheckpointError, parse_header, read_header

from .files import entry, raw, tensors_of

EIGHT = bytes(8)

MALFORMED = {
    "empty": (b"", "0 bytes long"),
    "seven bytes": (b"\2\0\0\0\0\0\0", "7 bytes long"),
    "huge header": (raw({}, length=MAX_HEADER_BYTES + 1), "more than the 100000000 allowed"),
    "header of 2**64 - 1": (b"\xff" * 8 + b"{}", "18446744073709551615 bytes announced"),
    "header longer than the file": (raw({}, length=100), "truncated"),
    "no header": (raw(b""), "does not begin with"),
    "not JSON": (raw(b"{]"), "not valid JSON"),
    "not UTF-8": (raw(b'{"\xff": 1}'), "not UTF-8"),
    "a list": (raw(b"[]"), "does not begin with"),
    "nested": (raw(b'{"a":' * 100_000 + b"1" + b"}" * 100_000), "nested too deep|not valid JSON"),
    "key twice": (raw(b'{"a": %b, "a": %b}' % ((json.dumps(entry()).encode(),) * 2), EIGHT), "'a' occurs twice"),
    "inner key twice": (raw(b'{"a": {"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}', EIGHT), "'dtype' occurs twice"),
    "NaN": (raw(b'{"a": NaN}'), "not valid JSON"),
    "half a surrogate pair": (raw(b'{"\\ud800": %b}' % json.dumps(entry()).encode(), EIGHT), "not Unicode text"),
    "metadata not strings": (raw({"__metadata__": {"a": 1}}), "__metadata__"),
    "metadata a list": (raw({"__metadata__": []}), "__metadata__"),
    "entry a number": (raw({"a": 1}), "'a': is not described"),
    "key missing": (raw({"a": {"dtype": "F32", "shape": [2]}}, EIGHT), "'data_offsets' are expected"),
    "key too many": (raw({"a": {**entry(), "x": 1}}, EIGHT), "'data_offsets' are expected"),
    "dtype": (raw({"a": entry("F31")}, EIGHT), "'a': dtype 'F31' is unknown"),
    "dtype a list": (raw({"a": {**entry(), "dtype": ["F32"]}}, EIGHT), "dtype .* is unknown"),
    "shape negative": (raw({"a": entry(shape=(-2,))}, EIGHT), "shape"),
    "shape a float": (raw({"a": entry(shape=(2.0,))}, EIGHT), "shape"),
    "shape a bool": (raw({"a": entry(shape=(True,))}, EIGHT), "shape"),
    "shape a string": (raw({"a": entry(shape="2")}, EIGHT), "shape"),
    "65 dimensions": (raw({"a": entry(shape=(1,) * 65)}, EIGHT), "65 dimensions"),
    "product overflows": (raw({"a": entry(shape=(2**40, 2**40))}, EIGHT), "too large"),
    "zero hides an overflow": (raw({"a": entry(shape=(0, 2**40, 2**40), offsets=(0, 0))}), "too large"),
    "digits": (raw(b'{"a": {"dtype":"F32","shape":[%b],"data_offsets":[0,8]}}' % (b"9" * 5000), EIGHT), "not valid JSON"),
    "offsets one": (raw({"a": entry(offsets=(0,))}, EIGHT), "two non-negative"),
    "offsets negative": (raw({"a": entry(offsets=(-8, 0))}, EIGHT), "two non-negative"),
    "offsets backwards": (raw({"a": entry(offsets=(8, 0))}, EIGHT), "before they begin"),
    "offsets and shape": (raw({"a": entry(offsets=(0, 4))}, EIGHT), r"span 4 bytes, but shape \[2\] of F32 is 8"),
    "half a byte": (raw({"a": entry("F4", (3,), (0, 2))}, EIGHT), "whole number of bytes"),
    "past the end": (raw({"a": entry()}, bytes(7)), "ends at byte"),
    "far past the end": (raw({"a": entry(offsets=(2**62, 2**62 + 8))}, EIGHT), "ends at byte"),
    "overlap": (raw({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12)), "'a' and 'b' overlap"),
    "same place": (raw({"a": entry(), "b": entry()}, EIGHT), "overlap"),
    "hole": (raw({"a": entry(), "b": entry(offsets=(12, 20))}, bytes(20)), "4 bytes before tensor 'b' belong to no tensor"),
    "hole at the start": (raw({"a": entry(offsets=(4, 12))}, bytes(12)), "4 bytes before tensor 'a'"),
    "rest": (raw({"a": entry()}, bytes(9)), "1 bytes at the end"),
    "rest without tensors": (raw({}, b"x"), "1 bytes at the end"),
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_malformed(kind, tmp_path):
    content, message = MALFORMED[kind]
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_header(path)
    assert str(path) in str(caught.value) and len(str(caught.value)) < 1000


def test_not_a_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.safetensors")
    for path in (tmp_path, tmp_path / "pipe.safetensors", tmp_path / "missing.safetensors"):
        with pytest.raises(CheckpointError, match="not a regular file|cannot be opened"):
            read_header(path)


def test_good_file(tmp_path):
    tensors = {
        **tensors_of(0), "scalar": torch.tensor(1.5), "empty": torch.empty(0, 7), "mask": torch.tensor([True, False, True]),
        "bf16": torch.ones(3, dtype=torch.bfloat16), "ids": torch.arange(5), "fp8": torch.ones(5).to(torch.float8_e4m3fn),
    }  # fmt: skip
    path = tmp_path / "x.safetensors"
    save_file(tensors, path, metadata={"format": "pt", "note": "ü"})
    header = read_header(path)
    assert header.metadata == {"format": "pt", "note": "ü"}
    assert set(header.tensors) == set(tensors)
    content = path.read_bytes()
    for name, info in header.tensors.items():
        assert info.shape == tuple(tensors[name].shape)
        expected = tensors[name].reshape(-1).view(torch.uint8) if tensors[name].numel() else torch.empty(0, dtype=torch.uint8)
        assert content[info.offset : info.offset + info.nbytes] == bytes(expected.tolist())
        assert info.nbytes == info.numel * BITS[info.dtype] // 8


def test_no_tensors(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(raw({}))
    assert read_header(tmp_path / "x.safetensors").tensors == {}


REAL = save({"a.weight": torch.ones(4, 3), "b": torch.zeros(2, dtype=torch.bfloat16), "c": torch.tensor(7)}, metadata={"format": "pt"})


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(edits=st.lists(st.tuples(st.integers(0, len(REAL) - 1), st.integers(0, 255)), max_size=6), end=st.integers(0, len(REAL) + 3))
def test_mutated_real_file(tmp_path, edits, end):
    """Whatever becomes of a real file's bytes, it is read within its bounds or refused."""
    content = bytearray(REAL + b"\0\0\0")
    for position, value in edits:
        content[position] = value
    path = tmp_path / "x.safetensors"
    path.write_bytes(content[:end])
    try:
        header = read_header(path)
    except CheckpointError:
        return
    assert sum(info.nbytes for info in header.tensors.values()) == end - header.data_start
    assert all(header.data_start <= i.offset and i.offset + i.nbytes <= end for i in header.tensors.values())


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5) | st.sampled_from(["F32", "F4", "BF16"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
_ENTRY = st.fixed_dictionaries({"dtype": st.sampled_from(sorted(BITS)) | _JSON, "shape": _JSON, "data_offsets": _JSON})


@settings(max_examples=400, deadline=None)
@given(st.dictionaries(st.text(max_size=3) | st.just("__metadata__"), _ENTRY | _JSON, max_size=4), st.integers(0, 64))
def test_any_json_header(tmp_path_factory, header, data):
    text = json.dumps(header).encode()
    try:
        tensors, _ = parse_header(text, 8 + len(text) + data, tmp_path_factory.getbasetemp() / "x")
    except CheckpointError:
        return
    assert sum(info.nbytes for info in tensors.values()) == data
