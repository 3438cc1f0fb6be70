"""What is wrong with a recipe: collected, with places, and raised all at once."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

__all__ = ["Path", "Problem", "Problems", "RecipeError", "did_you_mean", "path_text"]

Path = tuple  # keys and list positions from the recipe's root: ("models", 1, "parameters", "weight")


@dataclass(frozen=True)
class Problem:
    """One thing wrong.

    Attributes:
        source: the recipe's file name, or "recipe".
        line: in the file, from 1; None where it has no lines.
        place: "models[1].parameters.weight", empty for the recipe as a whole.
        message: what is wrong and what to do about it.
    """

    source: str
    line: int | None
    place: str
    message: str

    def __str__(self) -> str:
        line = f":{self.line}" if self.line else ""
        place = f"{self.place}: " if self.place else ""
        return f"{self.source}{line}: {place}{self.message}"


class RecipeError(ValueError):
    """A recipe that cannot be carried out. Nothing was read but headers, nothing was written.

    Attributes:
        problems: everything that is wrong with it, in the order of the recipe's lines.
    """

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        count = len(self.problems)
        heading = "" if count == 1 else f"{count} problems:\n"
        super().__init__(heading + "\n".join(map(str, self.problems)))


class Problems:
    """Collects problems and warnings while a recipe is checked.

    Attributes:
        source: what to call the recipe.
        warnings: things that look like mistakes but have a defined meaning.
    """

    def __init__(self, source: str = "recipe", lines: Mapping[Path, int] | None = None) -> None:
        self.source = source
        self.warnings: list[str] = []
        self._lines = dict(lines or {})
        self._found: list[Problem] = []

    def __bool__(self) -> bool:
        return bool(self._found)

    def add(self, path: Path, message: str) -> None:
        """Something is wrong at `path`."""
        self._found.append(Problem(self.source, self._line(path), path_text(path), message))

    def add_elsewhere(self, subject: str, message: str) -> None:
        """Something outside the recipe is wrong: `subject` is a path or an option."""
        self._found.append(Problem(subject, None, "", message))

    def warn(self, path: Path, message: str) -> None:
        """Something at `path` is allowed but doubtful."""
        self.warnings.append(str(Problem(self.source, self._line(path), path_text(path), message)))

    def found(self) -> list[Problem]:
        """The problems in the order of lines; those without one last."""
        return sorted(self._found, key=lambda p: p.line or 2**31)

    def raise_if_any(self) -> None:
        """Raise what was collected.

        Raises:
            RecipeError: anything was.
        """
        if self._found:
            raise RecipeError(self.found())

    def _line(self, path: Path) -> int | None:
        # A missing key has no line; its parent has.
        for end in range(len(path), -1, -1):
            if path[:end] in self._lines:
                return self._lines[path[:end]]
        return None


def path_text(path: Path) -> str:
    """("models", 1, "model") -> "models[1].model"."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def did_you_mean(name: object, options: Iterable[str]) -> str:
    """ "; did you mean 'weight'?" for the option nearest to `name`, "" when none is near."""
    near = difflib.get_close_matches(str(name).lower().replace("-", "_"), list(options), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
