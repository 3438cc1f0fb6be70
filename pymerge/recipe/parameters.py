"""The parameters of a merge for each tensor: what the recipe says at its levels, over the method's defaults."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..merge_methods.registry import REQUIRED, Method, Parameter
from .problems import Path, Problems, did_you_mean
from .values import Setting, parse_setting

__all__ = ["Level", "Parameters"]


@dataclass(frozen=True, eq=False)
class Level:
    """The ``parameters`` at one place of a recipe, checked; a setting without rules is one that is wrong."""

    path: Path
    settings: dict[str, Setting] = field(default_factory=dict)


class Parameters:
    """Resolves the parameters of one method.

    A value is looked up with the model first (for parameters that may differ by model), then with the slice, the module and in the
    recipe's global ``parameters``, then in the method's default. A level whose filters do not match a tensor is passed over.

    Args:
        method: the method.
        problems: where everything wrong goes.
    """

    def __init__(self, method: Method, problems: Problems) -> None:
        self._method = method
        self._problems = problems
        self._known = {p.recipe: p for p in method.parameters}
        self._levels: list[Level] = []
        self._count: dict[Path, int] = {}
        self._missing: dict[tuple[Path, str], list[str]] = {}

    def level(self, given: dict[str, Any], path: Path, of_model: bool = False) -> Level:
        """The parameters `given` at `path`, checked. With a single model (`of_model`) stand only those that may differ by model."""
        settings = {}
        for name, value in given.items():
            parameter = self._known.get(name)
            if parameter is None:
                hint = did_you_mean(name, self._known) or f"; it takes {', '.join(self._known) or 'no parameters'}"
                self._problems.add((*path, name), f"unknown parameter of {self._method.name!r}{hint}")
            elif of_model and not parameter.per_model:
                self._problems.add((*path, name), "is one value for the whole merge; move it to the recipe's global parameters")
            else:
                setting = parse_setting(value, parameter.kind, name, (*path, name), self._problems)
                if setting:
                    settings[name] = setting
                elif value is not None:
                    settings[name] = Setting(())
        self._levels.append(Level(path, settings))
        return self._levels[-1]

    def resolve(self, name: str, depth: float, shared: Sequence[Level], own: Sequence[Level], names: Sequence[str]) -> dict[str, Any]:
        """The method's keywords for one tensor of the output. What is missing is noted, see :meth:`report_missing`.

        Args:
            name: of the tensor, which filters of parameters for the whole merge see.
            depth: in the layers, in [0, 1].
            shared: levels that hold for all models, the innermost first.
            own: the level of each model that the method gets.
            names: of the tensor in each of these models, which filters of its parameters see.
        """
        for level in (*own, shared[-1]):
            self._count[level.path] = self._count.get(level.path, 0) + 1
        result: dict[str, Any] = {}
        for parameter in self._method.parameters:
            if parameter.per_model:
                values = [self._lookup(parameter, (level, *shared), n, depth) for level, n in zip(own, names, strict=True)]
                result[parameter.name] = tuple(values)
            else:
                result[parameter.name] = self._lookup(parameter, shared, name, depth)
        return result

    def _lookup(self, parameter: Parameter, levels: Sequence[Level], name: str, depth: float) -> Any:
        for level in levels:
            setting = level.settings.get(parameter.recipe)
            if setting is None:
                continue
            if not setting.rules:  # it was given but is wrong, which has been said
                return None
            value = setting.value(name, depth)
            if value is not None:
                return value
        if parameter.default is REQUIRED:
            path = levels[0].path if parameter.per_model else levels[-1].path
            self._missing.setdefault((path, parameter.recipe), []).append(name)
            return None
        return parameter.default

    def report_missing(self) -> None:
        """Say which required parameters had no value."""
        for (path, parameter), names in self._missing.items():
            if len(names) == self._count[path]:
                where = " nor in the global parameters" if path != ("parameters",) else ""
                self._problems.add(path, f"{parameter!r} is required by {self._method.name!r} and is not given here{where}")
            else:
                more = f" and {len(names) - 1} more" if len(names) > 1 else ""
                self._problems.add(
                    path, f"{parameter!r} has no value for {names[0]!r}{more}: no filter matches; end its list with '- value: ...'"
                )

    def warn_unused_filters(self, names: Iterable[str]) -> None:
        """Warn of filters that match none of the tensors."""
        names = list(names)
        for level in self._levels:
            for setting in level.settings.values():
                for rule in setting.rules:
                    if rule.filter is not None and not any(rule.filter in name for name in names):
                        self._problems.warn(rule.path[:-1], f"filter {rule.filter!r} is part of no tensor's name")
