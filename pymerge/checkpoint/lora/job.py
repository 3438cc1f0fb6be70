"""The merge of adapters with each other, one module after another; nothing is written here."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from ... import merge_methods  # noqa: F401 - registers the built-in methods
from ...arguments import per_model
from ...finite import NonFiniteError
from ...merge_methods.registry import REQUIRED, Method, get_method, methods
from ...recipe.problems import did_you_mean
from ...recipe.values import convert
from .. import dtypes
from ..format import CheckpointError
from ..load import load_tensor
from .adapter import Adapter, LowRank, open_adapter
from .combine import Part, Result, concatenated, is_exact, merged_factors, merged_products, nearest
from .save import SavedModule

__all__ = ["MergeJob", "open_job"]

SUMS = ("linear", "model_soup", "task_arithmetic")
"""Methods whose result on the products is a weighted sum, which thin factors give without forming any product."""

ON_FACTORS = (*SUMS, "ties", "dare_linear", "dare_ties")
"""Methods that can be applied to A and B separately: those that scale with the weights, whose roots go to either side, as PEFT has them."""


@contextmanager
def open_job(
    adapters: Sequence[str | os.PathLike],
    *,
    method: str = "cat",
    weights: float | Sequence[float] | None = None,
    on: str = "products",
    rank: int | None = None,
    energy: float | None = None,
    parameters: Mapping[str, Any] | None = None,
    check_base: bool = True,
) -> Iterator[MergeJob]:
    """Open adapters and check that they can be merged so; arguments and errors as :func:`pymerge.merge_adapters` has them."""
    with ExitStack() as stack:
        opened = [stack.enter_context(open_adapter(path)) for path in adapters]
        yield MergeJob(opened, method, weights, on, rank, energy, parameters or {}, check_base)


class MergeJob:
    """The merge of one module after another, see :func:`open_job`.

    Attributes:
        adapters: opened.
        names: of the modules, sorted.
        shared: tensors besides the factors, by name; the same in all adapters that have them.
        warnings: what may not be what was meant.
    """

    def __init__(
        self,
        adapters: list[Adapter],
        method: str,
        weights: float | Sequence[float] | None,
        on: str,
        rank: int | None,
        energy: float | None,
        parameters: Mapping[str, Any],
        check_base: bool,
    ) -> None:
        if not adapters:
            raise ValueError("there are no adapters to merge")
        if on not in ("products", "factors"):
            raise ValueError(f"on is {on!r}; choose 'products' or 'factors'")
        if rank is not None and (not isinstance(rank, int) or rank < 1):
            raise ValueError(f"rank is {rank!r}; it is a positive whole number")
        if energy is not None and not 0 < energy <= 1:
            raise ValueError(f"energy is {energy!r}; it is a fraction of the squared norm, in (0, 1]")
        reduces = rank is not None or energy is not None
        if reduces and (method == "cat" or on == "factors"):
            raise ValueError(f"{'cat' if method == 'cat' else 'a merge of the factors'} has no choice of rank; use method 'svd' for one")
        if method in ("cat", "svd") and on == "factors":
            raise ValueError(f"{method!r} is about the products; leave out on='factors'")
        self.adapters, self.name, self.on, self.rank = adapters, method, on, rank
        self.energy = None if energy is None else float(energy)
        self.weights = per_model(weights, len(adapters), "weights")
        self.names = sorted({name for adapter in adapters for name in adapter.modules})
        self.exact = method == "cat"
        self.warnings = _check_bases(adapters, check_base)
        self.check_base = check_base
        self.given = dict(parameters)
        self.method = None if method in ("cat", "svd") else _find_method(method, len(adapters))
        self.parameters = {} if self.method is None else self._resolve(self.method, parameters)
        if self.method is None and parameters:
            raise ValueError(f"{method!r} has no parameter {next(iter(parameters))!r}")
        if on == "factors" and len(adapters) > 1:
            self.warnings.append(
                "factors are merged separately: the result is not the merge of the adapters' changes (cross terms B_i A_j); "
                "on='products', 'cat' and 'svd' are"
            )
        self._check_modules()
        self.shared = _shared_tensors(adapters)

    def _resolve(self, method: Method, given: Mapping[str, Any]) -> dict[str, Any]:
        """Keywords of the method's function."""
        known = {p.recipe: p for p in method.parameters}
        for key in given:
            if key not in known or key == "weight":
                hint = "; give weights as an argument of its own" if key == "weight" else did_you_mean(key, known)
                raise ValueError(f"{method.name!r} has no parameter {key!r}{hint}")
        if self.on == "factors" and method.name not in ON_FACTORS:
            raise ValueError(f"{method.name!r} cannot be applied to factors, only {', '.join(ON_FACTORS)}; leave out on='factors'")
        result: dict[str, Any] = {}
        for p in method.parameters:
            value = given.get(p.recipe)
            if p.recipe == "weight":
                result[p.name] = self.weights
            elif value is None:
                default = {"convention": "peft", "normalize": None if p.default is None else False}.get(p.recipe, p.default)  # as PEFT does
                value = default if self.on == "factors" else p.default
                if value is REQUIRED:
                    raise ValueError(f"{method.name!r} needs the parameter {p.recipe!r}")
                result[p.name] = (value,) * len(self.adapters) if p.per_model else value
            elif p.per_model:
                values = value if isinstance(value, (list, tuple)) else [value] * len(self.adapters)
                if len(values) != len(self.adapters):
                    raise ValueError(f"{p.recipe} has {len(values)} values for {len(self.adapters)} adapters")
                result[p.name] = tuple(_converted(v, p) for v in values)
            else:
                result[p.name] = _converted(value, p)
        return result

    def _check_modules(self) -> None:
        missing = [sum(name not in adapter.modules for name in self.names) for adapter in self.adapters]
        for adapter, count in zip(self.adapters, missing):
            if count:
                self.warnings.append(
                    f"{adapter.path} does not change {count} of the {len(self.names)} modules; it counts as no change there"
                )
        for name in self.names:
            first = self.example(name)
            for adapter in self.adapters:
                change = adapter.modules.get(name)
                if change is None:
                    continue
                if change.bias is not None:
                    raise CheckpointError(f"{adapter.path}: has a bias in {name!r} (lora_bias), which merging adapters does not cover")
                if (change.kind, change.shape) != (first.kind, first.shape):
                    raise CheckpointError(
                        f"{adapter.path}: module {name!r} is {change.kind} {list(change.shape)}, in another adapter {first.kind} "
                        f"{list(first.shape)}; they are not of the same model"
                    )
                if self.on == "factors" and change.rank != first.rank:
                    raise CheckpointError(
                        f"{adapter.path}: module {name!r} has rank {change.rank}, another adapter {first.rank}; factors of different ranks "
                        "cannot be merged: leave out on='factors'"
                    )

    def example(self, name: str) -> LowRank:
        """The first adapter's change of a module."""
        return next(adapter.modules[name] for adapter in self.adapters if name in adapter.modules)

    def merge(self, name: str) -> Result:
        """One module, merged."""
        parts: list[Part | None] = []
        for adapter in self.adapters:
            change = adapter.modules.get(name)
            parts.append(None if change is None else _part(adapter, change))
        there = [part for part in parts if part is not None]
        rank = self.rank
        if rank is None and self.energy is None:
            rank = max(part.a.shape[0] for part in there)
        if self.method is not None and self.on == "factors":
            weights = [w for w, part in zip(self.weights, parts) if part is not None]
            kept = {key: _of_those(value, parts) for key, value in self.parameters.items()}
            return merged_factors(there, weights, self.method, kept, name)
        coefficients = self._coefficients()
        if coefficients is None:
            shape = (there[0].b.shape[0], there[0].a.shape[1])
            return merged_products(parts, shape, self.method, self.parameters, f"{name}.weight", rank, self.energy)
        there_coefficients = [c for c, part in zip(coefficients, parts) if part is not None]
        if self.name == "cat":
            self.exact = self.exact and is_exact(there, there_coefficients)
            return concatenated(there, there_coefficients)
        return nearest(there, there_coefficients, rank, self.energy)

    def _coefficients(self) -> list[float] | None:
        """What the products are multiplied by, where the result is their sum."""
        if self.method is None:
            return list(self.weights)
        if self.name not in SUMS:
            return None
        total = sum(self.weights) if self.parameters["normalize"] else 1.0
        if abs(total) <= 1e-6 * sum(map(abs, self.weights)):
            raise ValueError(
                f"weights {list(self.weights)} sum to zero, so they cannot be normalised; pass normalize=False or other weights"
            )
        return [self.parameters.get("scale", 1.0) * w / total for w in self.weights]

    def dtype(self) -> str:
        """Code of the result's dtype where none was asked for."""
        codes = {info.dtype for adapter in self.adapters for change in adapter.modules.values() for info in (change.a, change.b)}
        common = dtypes.promote(codes)
        return "F32" if self.name == "cat" and not self.exact and common != "F64" else common

    def saved(self, name: str, result: Result, code: str) -> SavedModule:
        """A merged module as it is written, in a dtype.

        Raises:
            CheckpointError: it overflows.
        """
        return _to_save(self.example(name), result, dtypes.torch_dtype(code))

    def recipe(self, code: str) -> dict[str, Any]:
        """The recipe that does this again with `pymerge merge`; with the dtype of the result, which then need not be found."""
        each = [{"weight": weight} for weight in self.weights]
        shared: dict[str, Any] = {}
        for key, value in self.given.items():
            if isinstance(value, (list, tuple)):
                for own, one in zip(each, value, strict=True):
                    own[key] = one
            else:
                shared[key] = value
        settings = {
            "rank": self.rank,
            "energy": self.energy,
            "on": None if self.on == "products" else self.on,
            "any_base": None if self.check_base else True,
        }
        return {
            "merge_method": self.name,
            "models": [{"model": str(adapter.path), "parameters": own} for adapter, own in zip(self.adapters, each, strict=True)],
            "parameters": {**shared, **{key: value for key, value in settings.items() if value is not None}},
            "dtype": dtypes.name_of(code),
        }

    def config(self) -> dict[str, Any]:
        """Settings of the result's adapter_config.json that its tensors do not determine."""
        return _config(self.adapters)

    def describe(self) -> str:
        """What was done, in a line."""
        settings = {"weights": list(self.weights), "rank": self.rank, "energy": self.energy, **self.given}
        listed = ", ".join(f"{key} {value}" for key, value in settings.items() if value is not None)
        return f"{self.name} on {self.on}: {listed}"


def _part(adapter: Adapter, change: LowRank) -> Part:
    b, a = adapter.factors(change)
    for info, tensor in ((change.b, b), (change.a, a)):
        if not bool(torch.isfinite(tensor.float()).all()):
            raise NonFiniteError(f"{adapter.path}: {info.name!r} has NaN or Inf")
    return Part(b, a, change.scale)


def _find_method(name: str, count: int) -> Method:
    if name not in methods():
        known = ("cat", "svd", *methods())
        raise ValueError(f"there is no method {name!r} for adapters{did_you_mean(name, known) or f'; there are {chr(44).join(known)}'}")
    method = get_method(name)
    if not method.min_models <= count <= method.max_models:
        raise ValueError(f"{name!r} takes {method.min_models} to {method.max_models} models; {count} adapters given")
    return method


def _converted(value: Any, parameter) -> Any:
    try:
        return convert(value, parameter.kind, parameter.recipe)
    except ValueError as error:
        raise ValueError(f"{parameter.recipe} {error}") from None


def _of_those(value: Any, parts: Sequence[Part | None]) -> Any:
    """Values per adapter of the adapters that change the module."""
    if isinstance(value, tuple) and len(value) == len(parts):
        return tuple(v for v, part in zip(value, parts) if part is not None)
    return value


def _check_bases(adapters: list[Adapter], check: bool) -> list[str]:
    named = {(adapter.config.base_model, adapter.config.revision): adapter for adapter in adapters if adapter.config.base_model}
    if len(named) <= 1:
        return []
    listed = ", ".join(f"{adapter.path} on {base}{f'@{revision}' if revision else ''}" for (base, revision), adapter in named.items())
    if check:
        raise CheckpointError(
            f"the adapters name different base models ({listed}); if these are the same model, say so with check_base=False (--any-base)"
        )
    return [f"the adapters name different base models ({listed})"]


def _shared_tensors(adapters: list[Adapter]) -> dict[str, Tensor]:
    """Tensors besides the factors, which must be the same in all adapters that have them, as copies of the base's embeddings are."""
    found: dict[str, tuple[Tensor, Adapter]] = {}
    for adapter in adapters:
        for name, info in adapter.replaced.items():
            tensor = load_tensor(adapter.store, info)
            other, where = found.setdefault(name, (tensor, adapter))
            same = other.dtype == tensor.dtype and other.shape == tensor.shape and torch.equal(other, tensor)
            if not same or any(name not in a.replaced for a in adapters):
                raise CheckpointError(
                    f"{adapter.path}: has trained {name!r} as a whole (bias, modules_to_save), and "
                    + ("another adapter has not" if same else f"so has {where.path}, in another way")
                    + "; merging adapters covers factors alone: add each adapter to the base (model+adapter) and merge the models"
                )
    return {name: tensor for name, (tensor, _) in found.items()}


def _to_save(change: LowRank, result: Result, dtype: torch.dtype) -> SavedModule:
    """A result in PEFT's shapes."""
    rank = result.a.shape[0]
    kernel = change.a.shape[2:]
    a = result.a.to(dtype).reshape(rank, change.a.shape[1], *kernel)
    b = result.b.to(dtype).reshape(change.b.shape[0], rank, *(1 for _ in kernel))
    for side, tensor in (("A", a), ("B", b)):
        if not bool(torch.isfinite(tensor.float()).all()):
            raise CheckpointError(f"{change.module!r}: lora_{side} overflows {dtype}; choose another dtype")
    return SavedModule(change.kind, a, b, result.scale * rank)


def _config(adapters: list[Adapter]) -> dict[str, Any]:
    """Settings of the first adapter, without those that the merge has used up."""
    config = dict(adapters[0].config.content)
    fixed = {
        "use_rslora": False, "bias": "none", "lora_bias": False, "modules_to_save": None, "layers_to_transform": None,
        "layers_pattern": None, "exclude_modules": None, "init_lora_weights": True, "inference_mode": True, "lora_dropout": 0.0,
        "loftq_config": {},
    }  # fmt: skip
    config.update({key: value for key, value in fixed.items() if key in config or key in ("use_rslora", "bias")})
    if adapters[0].replaced:  # then the adapters agree on them, and these settings say what they are
        config.update({key: adapters[0].config.content.get(key) for key in ("bias", "modules_to_save")})
    return config
