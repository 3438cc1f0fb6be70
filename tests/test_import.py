"""What `import pymerge` gives and costs."""

import subprocess
import sys

import pymerge

CODE = """
import sys, time, torch
before = set(sys.modules)
start = time.perf_counter()
import pymerge
print(time.perf_counter() - start)
print(*sorted({name.partition(".")[0] for name in set(sys.modules) - before}))
"""


def test_import_is_quick_and_leaves_the_heavy_parts_out():
    """Under 0.2 s beyond torch; the machine may be busy, so one quick import of three is enough."""
    for _ in range(3):
        seconds, new = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True).stdout.splitlines()
        assert not {"yaml", "safetensors", "triton", "transformers", "numpy", "matplotlib"} & set(new.split())
        if float(seconds) < 0.2:
            return
    raise AssertionError(f"import pymerge took {seconds} s three times; new modules: {new}")


def test_public_names():
    assert pymerge.__version__ == "0.1.0"
    for name in pymerge.__all__:
        assert name in dir(pymerge)
        if name != "merge":  # imported at its first use, by the tests of checkpoint
            assert getattr(pymerge, name) is not None
    try:
        pymerge.no_such_name  # noqa: B018
    except AttributeError as error:
        assert str(error) == "module 'pymerge' has no attribute 'no_such_name'"


def test_public_functions_are_documented():
    for name in pymerge.__all__:
        thing = None if name == "merge" else getattr(pymerge, name)
        if callable(thing) and name != "REQUIRED":
            assert thing.__doc__, name
