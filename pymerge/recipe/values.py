"""One parameter as a recipe gives it: a scalar, a gradient over the layers, or either of them by filters on tensor names."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .problems import Path, Problems, did_you_mean

__all__ = ["Setting", "convert", "parse_setting"]


@dataclass(frozen=True)
class Rule:
    """`values` for the tensors whose name contains `filter` (None: for all); one value, or a gradient over the depth."""

    filter: str | None
    values: tuple
    path: Path

    def matches(self, name: str) -> bool:
        return self.filter is None or self.filter in name

    def at(self, depth: float) -> Any:
        """The value at a depth in [0, 1]: numbers are interpolated linearly between their evenly spaced places, others step."""
        position = depth * (len(self.values) - 1)
        low = min(int(position), len(self.values) - 1)
        fraction = position - low
        if fraction == 0.0 or not isinstance(self.values[low], float):
            return self.values[low]
        return (1.0 - fraction) * self.values[low] + fraction * self.values[low + 1]


@dataclass(frozen=True)
class Setting:
    """What a recipe says about one parameter at one level; the first rule that matches counts."""

    rules: tuple[Rule, ...]

    def value(self, name: str, depth: float) -> Any:
        """The value for the tensor `name`, None when no rule matches."""
        for rule in self.rules:
            if rule.matches(name):
                return rule.at(depth)
        return None


def parse_setting(value: Any, kind: type, recipe_name: str, path: Path, problems: Problems) -> Setting | None:
    """Read a parameter's value; None when it is not given or wrong (what is wrong goes to `problems`)."""
    if value is None:
        return None
    if isinstance(value, Mapping):
        rules = [_rule(value, kind, recipe_name, path, problems)]
    elif isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in value):
        rules = []
        for i, item in enumerate(value):
            if isinstance(item, Mapping):
                rules.append(_rule(item, kind, recipe_name, (*path, i), problems))
            else:
                problems.add((*path, i), f"is {item!r} among filters; write '- value: {item}': it applies where no filter before it does")
                rules.append(None)
    else:
        rules = [_make_rule(None, value, kind, recipe_name, path, problems)]
    good = tuple(rule for rule in rules if rule is not None)
    return Setting(good) if len(good) == len(rules) else None


def _rule(item: Mapping, kind: type, recipe_name: str, path: Path, problems: Problems) -> Rule | None:
    wrong = [key for key in item if key not in ("filter", "value")]
    for key in wrong:
        problems.add((*path, key), f"unknown key{did_you_mean(key, ('filter', 'value')) or '; a rule has filter and value'}")
    if item.get("value") is None:
        problems.add((*path, "value"), "is missing; a rule has 'filter' (part of a tensor's name) and 'value'")
        return None
    pattern = item.get("filter")
    if pattern is not None and not isinstance(pattern, str):
        problems.add((*path, "filter"), f"is {pattern!r}; write a part of the names of the tensors that are meant, in quotes")
        return None
    if wrong:
        return None
    return _make_rule(None if pattern == "*" else pattern, item["value"], kind, recipe_name, (*path, "value"), problems)


def _make_rule(pattern: str | None, value: Any, kind: type, recipe_name: str, path: Path, problems: Problems) -> Rule | None:
    items = list(value) if isinstance(value, list | tuple) else [value]
    if not items:
        problems.add(path, "is an empty list; a gradient has at least one value")
        return None
    values = []
    for i, item in enumerate(items):
        try:
            values.append(convert(item, kind, recipe_name))
        except ValueError as error:
            problems.add((*path, i) if isinstance(value, list | tuple) else path, str(error))
    return Rule(pattern, tuple(values), path) if len(values) == len(items) else None


def convert(value: Any, kind: type, recipe_name: str) -> Any:
    """`value` as `kind`.

    Raises:
        ValueError: it is none, or out of range; the message is meant for the recipe's author.
    """
    if kind is float:
        return _number(value, recipe_name)
    if kind is int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"is {value!r}; write a whole number")
        return value
    if kind is bool:
        if isinstance(value, bool) or (isinstance(value, int) and value in (0, 1)):
            return bool(value)
        raise ValueError(f"is {value!r}; write true or false")
    if not isinstance(value, kind):
        raise ValueError(f"is {value!r}; write {'text' if kind is str else kind.__name__}")
    return value


def _number(value: Any, recipe_name: str) -> float:
    number = None
    if isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            number = float(value)  # YAML 1.1 reads 1e-5 as text
        except (ValueError, OverflowError):
            pass
    if number is None or not math.isfinite(number):
        raise ValueError(f"is {value!r}; write a finite number")
    if recipe_name == "density" and not 0.0 <= number <= 1.0:
        raise ValueError(f"is {value}; density is the fraction kept, between 0 and 1")
    return number
