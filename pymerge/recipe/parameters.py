"""The parameters of a merge for each tensor: what the recipe says at its two levels, over the method's defaults."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from ..merge_methods.registry import REQUIRED, Method, Parameter
from .layers import LayerDepths
from .problems import Path, Problems, did_you_mean
from .schema import Recipe
from .values import Setting, parse_setting

__all__ = ["Parameters"]


class Parameters:
    """Resolves the parameters of one method under one recipe.

    A value is looked up with the model first (for parameters that may differ by model), then in the recipe's global ``parameters``, then
    in the method's default. A level whose filters do not match a tensor is passed over.

    Args:
        method: the method.
        recipe: whose parameters to use.
        merged: for each model that the method gets in `models`, its place in ``recipe.models``, or None for a base that was not listed.
        ignored: places in ``recipe.models`` whose parameters have no effect: those of the base.
        problems: where everything wrong goes.
    """

    def __init__(self, method: Method, recipe: Recipe, merged: Sequence[int | None], ignored: Iterable[int], problems: Problems) -> None:
        self._method = method
        self._merged = tuple(merged)
        self._problems = problems
        self._missing: dict[tuple[Path, str], list[str]] = {}
        known = {p.recipe: p for p in method.parameters}
        self._global = self._level(recipe.parameters, ("parameters",), known, False)
        self._own: dict[int, dict[str, Setting]] = {}
        unused = set(ignored)
        for i, entry in enumerate(recipe.models):
            path = ("models", i, "parameters")
            self._own[i] = self._level(entry.parameters, path, known, True)
            if i in unused and entry.parameters:
                problems.warn(path, "have no effect: this is the base model, and deltas are taken from it")

    def _level(self, given: dict[str, Any], path: Path, known: dict[str, Parameter], of_model: bool) -> dict[str, Setting]:
        settings = {}
        for name, value in given.items():
            parameter = known.get(name)
            if parameter is None:
                hint = did_you_mean(name, known) or f"; it takes {', '.join(known) or 'no parameters'}"
                self._problems.add((*path, name), f"unknown parameter of {self._method.name!r}{hint}")
            elif of_model and not parameter.per_model:
                self._problems.add((*path, name), "is one value for the whole merge; move it to the recipe's global parameters")
            else:
                setting = parse_setting(value, parameter.kind, name, (*path, name), self._problems)
                if setting:
                    settings[name] = setting
                elif value is not None:
                    settings[name] = Setting(())
        return settings

    def resolve(self, name: str, depths: LayerDepths) -> dict[str, Any]:
        """The method's keywords for the tensor `name`. What is missing is noted, see :meth:`report_missing`."""
        depth = depths.depth(name)
        result: dict[str, Any] = {}
        for parameter in self._method.parameters:
            if parameter.per_model:
                result[parameter.name] = tuple(self._lookup(parameter, index, name, depth) for index in self._merged)
            else:
                result[parameter.name] = self._lookup(parameter, None, name, depth)
        return result

    def _lookup(self, parameter: Parameter, index: int | None, name: str, depth: float) -> Any:
        levels = [self._own[index], self._global] if index is not None else [self._global]
        for level in levels:
            setting = level.get(parameter.recipe)
            if setting is None:
                continue
            if not setting.rules:  # it was given but is wrong, which has been said
                return None
            value = setting.value(name, depth)
            if value is not None:
                return value
        if parameter.default is REQUIRED:
            path = ("parameters",) if index is None else ("models", index, "parameters")
            self._missing.setdefault((path, parameter.recipe), []).append(name)
            return None
        return parameter.default

    def report_missing(self, count: int) -> None:
        """Say which required parameters had no value; `count` is the number of tensors that were resolved."""
        for (path, parameter), names in self._missing.items():
            if len(names) == count:
                where = " nor in the global parameters" if path != ("parameters",) else ""
                self._problems.add(path, f"{parameter!r} is required by {self._method.name!r} and is not given here{where}")
            else:
                more = f" and {len(names) - 1} more" if len(names) > 1 else ""
                self._problems.add(
                    path, f"{parameter!r} has no value for {names[0]!r}{more}: no filter matches; end its list with '- value: ...'"
                )

    def warn_unused_filters(self, names: Sequence[str]) -> None:
        """Warn of filters that match none of the tensors."""
        levels = [(("parameters",), self._global)] + [(("models", i, "parameters"), own) for i, own in self._own.items()]
        for _, level in levels:
            for setting in level.values():
                for rule in setting.rules:
                    if rule.filter is not None and not any(rule.filter in name for name in names):
                        self._problems.warn(rule.path[:-1], f"filter {rule.filter!r} is part of no tensor's name")
