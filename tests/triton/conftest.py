"""What the tests of the Triton kernels share. They run in Triton's interpreter, or on a GPU with TRITON_INTERPRET=0."""

import os

import pytest
import torch

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

DEVICE = torch.device("cpu" if os.environ.get("TRITON_INTERPRET", "1") != "0" else "cuda")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.fixture(autouse=True)
def one_device():
    """Where there is nothing to run on, nothing runs."""
    pytest.importorskip("triton")
    if DEVICE.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("TRITON_INTERPRET=0 needs a GPU")


_patched = set()


@pytest.fixture(autouse=True)
def quick_interpreter(monkeypatch):
    """Half of the interpreter's time goes into patching triton.language at every call of a device function.

    The kernel has done that already, but for functions of Triton's own, which see the language as `core`: once is enough for those.
    """
    if DEVICE.type != "cpu":
        return
    interpreter = pytest.importorskip("triton.runtime.interpreter")

    def call(self, *args, **kwargs):
        module = self.fn.__globals__.get("__name__", "")
        if module.startswith("triton.") and module not in _patched:
            _patched.add(module)
            interpreter._patch_lang(self.fn)
        return self.rewrite()(*args, **kwargs)

    monkeypatch.setattr(interpreter.InterpretedFunction, "__call__", call)


@pytest.fixture(params=DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def dtype(request):
    return request.param


def there(t):
    """A tensor, or None, on the device under test."""
    return None if t is None else t.to(DEVICE)


def poisoned(n: int, dtype: torch.dtype) -> torch.Tensor:
    """An output that shows what nobody wrote."""
    return torch.full((n,), float("nan"), dtype=dtype, device=DEVICE)


@pytest.fixture
def launches(monkeypatch):
    """A list that gets each kernel's name as it is launched; `launches.inside` is true while one runs."""

    class Launches(list):
        inside = False

    from pymerge.triton_kernels.combine import combine_kernel

    seen, kind = Launches(), type(combine_kernel)
    plain = kind.__getitem__

    def counted(kernel, grid):
        def run(*args, **kwargs):
            seen.append(kernel.fn.__name__)
            seen.inside = True
            try:
                return plain(kernel, grid)(*args, **kwargs)
            finally:
                seen.inside = False

        return run

    monkeypatch.setattr(kind, "__getitem__", counted)
    return seen
