"""The step of the pipeline between reading and writing: one piece of one tensor after another, by the plan's method."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from ..finite import NonFiniteError
from . import dtypes
from .device import device_errors
from .failures import MergeError
from .format import CheckpointError
from .memory import Group, Piece, input_pieces, size_of
from .pipeline import Starts
from .plan import Plan, TensorPlan
from .settings import is_built_in
from .sizes import format_bytes

__all__ = ["TensorMerger"]

NARROW = ("F16", "F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ")
"""Types whose largest number is small enough for sums of weights to overflow."""


class TensorMerger:
    """Merges the pieces of a plan's tensors where the pipeline has put them: in the host's memory or on a device."""

    def __init__(self, plan: Plan, check_finite: bool) -> None:
        self._plan = plan
        self._check_finite = check_finite
        # Our own methods compute in fp32 whatever the storage, so widening to fp32 first would only take memory. Others may not.
        self._widens = is_built_in(plan.method)
        self._steps: dict[int, int] = {}

    def merge(self, piece: Piece, source: Tensor, starts: Starts, target: Tensor) -> None:
        """See :class:`pymerge.checkpoint.pipeline.PieceMerger`."""
        tensor = piece.tensor
        sizes = {key: size for key, (_, _, size) in input_pieces(piece).items()}
        places = [(starts[index, info.name], sizes[index, info.name]) for index, info in tensor.inputs]
        inputs = [source[start : start + size] for start, size in places]
        if tensor.copied:
            self._copy(tensor, inputs, target)
            return
        result = target.view(dtypes.torch_dtype(tensor.output.dtype))
        finite = True
        with self._explained(piece, source.device):
            if piece.group is None:
                self._merge_whole(tensor, inputs, result.view(tensor.output.shape))
            else:
                self._merge_slice(piece, piece.group, inputs, result)
            if piece.merged and self._check_finite and tensor.output.dtype in NARROW:
                finite = bool(torch.isfinite(result.float()).all())
        if not finite:
            raise MergeError(
                f"{tensor.output.name!r}: the merged values overflow {dtypes.name_of(tensor.output.dtype)}; "
                "choose another out_dtype, such as bfloat16"
            )

    def _merge_whole(self, tensor: TensorPlan, inputs: Sequence[Tensor], result: Tensor) -> None:
        base, models = self._typed(tensor, inputs, shaped=True)
        got = self._plan.method.tensor(
            base, models, name=tensor.output.name, dtype=result.dtype, out=result, check_finite=self._check_finite, **tensor.parameters
        )
        if got is not result:
            if got.shape != result.shape:
                raise ValueError(f"returned shape {list(got.shape)} for tensors of shape {list(result.shape)}")
            result.copy_(got)

    def _merge_slice(self, piece: Piece, group: Group, inputs: Sequence[Tensor], result: Tensor) -> None:
        sliced, name = group.sliced, piece.tensor.output.name

        def read(name: str, ranges: Sequence[tuple[int, int]]) -> tuple[Tensor | None, list[Tensor]]:
            return self._read(group.tensors[name], ranges, inputs[0].device)

        step = self._steps.setdefault(id(group), -1)
        while step < piece.step:
            if step >= 0:
                sliced.end(step, read)
            step = self._steps[id(group)] = step + 1
            if step < sliced.passes:
                sliced.begin(step, read)
        base, models = self._typed(piece.tensor, inputs)
        if step < sliced.passes:
            sliced.add(step, name, piece.first, base, models)
        else:
            sliced.merge(name, piece.first, base, models, result, self._check_finite)

    def _read(self, tensor: TensorPlan, ranges: Sequence[tuple[int, int]], device: torch.device) -> tuple[Tensor | None, list[Tensor]]:
        """Elements out of order, read here and now: samples, and what has to be looked at again."""
        inputs = []
        for index, info in tensor.inputs:
            data = torch.empty(sum(size_of(info.dtype, end - begin) for begin, end in ranges), dtype=torch.uint8)
            view, position = memoryview(data.numpy()), 0
            for begin, end in ranges:
                size = size_of(info.dtype, end - begin)
                self._plan.checkpoints[index].read_into(info, view[position : position + size], size_of(info.dtype, begin))
                position += size
            inputs.append(data.to(device))
        return self._typed(tensor, inputs)

    def _typed(self, tensor: TensorPlan, inputs: Sequence[Tensor], shaped: bool = False) -> tuple[Tensor | None, list[Tensor]]:
        """Bytes as base and models, of their shape or flat, cast as the recipe says."""
        typed = [x.view(dtypes.torch_dtype(info.dtype)) for x, (_, info) in zip(inputs, tensor.inputs, strict=True)]
        typed = [self._cast(x.view(info.shape) if shaped else x) for x, (_, info) in zip(typed, tensor.inputs, strict=True)]
        return (typed[0], typed[1:]) if tensor.has_base else (None, typed)

    def _cast(self, x: Tensor) -> Tensor:
        code = self._plan.recipe.dtype
        if code is None or (self._widens and code == "F32" and x.dtype in (torch.bfloat16, torch.float16)):
            return x
        return x.to(dtypes.torch_dtype(code))

    def _copy(self, tensor: TensorPlan, pieces: Sequence[Tensor], out: Tensor) -> None:
        for i, piece in enumerate(pieces[1:], 1):
            if not torch.equal(pieces[0], piece):
                first, other = (self._plan.names[tensor.inputs[k][0]] for k in (0, i))
                raise MergeError(
                    f"{tensor.output.name!r} is of dtype {tensor.output.dtype}, which cannot be merged, "
                    f"and differs between {first} and {other}; merge models that agree in it"
                )
        out.copy_(pieces[0])

    @contextmanager
    def _explained(self, piece: Piece, device: torch.device):
        tensor = piece.tensor
        try:
            yield
        except NonFiniteError as error:
            raise NonFiniteError(self._with_model_name(str(error), tensor)) from None
        except torch.OutOfMemoryError as error:
            size = format_bytes(piece.bytes_out + sum(size for _, _, size in input_pieces(piece).values()))
            doing = f"{tensor.output.name!r}: {size} of it are there, and {self._plan.method.name!r} needs memory besides"
            with device_errors(device, doing):
                raise error
        except getattr(torch, "AcceleratorError", ()) as error:
            with device_errors(device, repr(tensor.output.name)):
                raise error
        except MemoryError:
            raise MergeError(
                f"{tensor.output.name!r}: there is not enough memory to merge it; `pymerge plan` shows how much the merge takes"
            ) from None
        except CheckpointError:
            raise
        except (ValueError, TypeError, RuntimeError) as error:
            raise MergeError(f"{tensor.output.name!r}: {self._plan.method.name!r} failed: {error}") from error

    def _with_model_name(self, message: str, tensor: TensorPlan) -> str:
        """Methods say "base" and "model 1"; people know their models by path."""
        match = re.match(r"(?:(base)|model (\d+)): ", message)
        if not match:
            return message
        which = 0 if match.group(1) else int(match.group(2)) + tensor.has_base
        index, info = tensor.inputs[which]
        code = self._plan.recipe.dtype
        cast = f" (after the recipe's dtype turned it from {info.dtype} into {code})" if code not in (None, info.dtype) else ""
        return f"{self._plan.checkpoints[index].path}: {message[match.end() :]}{cast}"
