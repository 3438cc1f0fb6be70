"""A short run of the fuzzer; `python -m tests.fuzz.run --minutes 5` is a long one."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from .guard import MEMORY, Violation, guarded
from .run import attempt
from .targets import TARGETS, prepare


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    prepare(folder)
    return folder


@pytest.mark.parametrize("name", TARGETS)
@settings(max_examples=25)
@given(number=st.integers(0, 2**64), memory=st.booleans())
def test_taken_or_refused_as_documented(folder, name, number, memory):
    attempt(name, number, folder, memory)


def test_the_guard_sees(tmp_path):
    """A guard that cannot bark would let everything pass."""
    (tmp_path / "in").mkdir()
    (tmp_path / "out.txt").write_text("x")
    with pytest.raises(Violation, match="out.txt"):
        with guarded(10, (tmp_path / "in",), None):
            (tmp_path / "out.txt").read_text()
    with pytest.raises(Violation, match="for writing"):
        with guarded(10, (tmp_path,), None):
            (tmp_path / "in/new").write_text("x")
    with pytest.raises(Violation, match="bytes of memory for an input of 10 bytes"):
        with guarded(10, (tmp_path,), MEMORY):
            bytearray(20_000_000)
