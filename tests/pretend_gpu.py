"""Tensors that say they are on a GPU, on a machine without one: what torch would refuse or compute otherwise there shows.

Their values are in the CPU's memory and every operation runs there, but operations that mix devices are errors, and a division by a number
of the host is a multiplication by its reciprocal, as torch's CUDA kernel has it.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

GPU = torch.device("cuda:0")
OF_THE_HOST = {"pymerge.dots.default", "pymerge.select.default", "pymerge.vote_balance.default"}  # results
CROSSING = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}


class OnGpu(torch.Tensor):
    """A tensor whose values are `values`, which lie somewhere else."""

    @staticmethod
    def __new__(cls, values):
        made = torch.Tensor._make_wrapper_subclass(
            cls, values.shape, strides=values.stride(), storage_offset=values.storage_offset(), dtype=values.dtype, device=GPU
        )
        made.values_ = values
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})

    # These want a device guard before they ask anybody.

    def __getitem__(self, at):
        return OnGpu(self.values_[_of_values(at)])

    def __setitem__(self, at, value):
        assert not isinstance(value, torch.Tensor) or isinstance(value, OnGpu) or value.dim() == 0
        self.values_[_of_values(at)] = _of_values(value)

    def __int__(self):
        return int(self.values_)

    def contiguous(self):
        return OnGpu(self.values_.contiguous())

    def tolist(self):
        return self.values_.tolist()


def _of_values(x):
    return x.values_ if isinstance(x, OnGpu) else x


def compute(func, args, kwargs):
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    there = [x for x in tensors if isinstance(x, OnGpu)]
    device = kwargs.get("device")
    if there and func not in CROSSING and any(x.dim() for x in tensors if not isinstance(x, OnGpu)):
        # Shapes, thresholds and the like of pymerge's own operators are the host's.
        if func.namespace != "pymerge":
            raise RuntimeError(f"{func} of tensors on {GPU} and on the CPU")
    if func is torch.ops.aten.div.Tensor and there and not isinstance(args[1], OnGpu) and args[0].dtype.is_floating_point:
        reciprocal = 1.0 / torch.as_tensor(args[1], dtype=args[0].dtype)
        return OnGpu(args[0].values_ * reciprocal)
    here = tree_map(_of_values, (args, {**kwargs, **({"device": "cpu"} if device else {})}))
    result = func(*here[0], **here[1])
    if args and result is here[0][0]:  # in place
        return args[0]
    stays = torch.device(device).type == "cuda" if device is not None else bool(there)
    return tree_map(lambda x: OnGpu(x) if stays and isinstance(x, torch.Tensor) and str(func) not in OF_THE_HOST else x, result)


class PretendGpu(TorchDispatchMode):
    """While this is on, tensors can be made on the GPU and moved there."""

    def __enter__(self):
        self._init, torch.cuda._lazy_init = torch.cuda._lazy_init, lambda: None
        return super().__enter__()

    def __exit__(self, *error):
        torch.cuda._lazy_init = self._init
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return compute(func, args, kwargs or {})
