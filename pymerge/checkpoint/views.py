"""The tensors of a checkpoint under the names that they have in the output: without tied copies, by module, and with layers renumbered."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from ..recipe.layers import LayerDepths, find_layer, side_of, stacks_of
from ..recipe.modules import assign_modules
from ..recipe.problems import Path as Place
from ..recipe.problems import Problems
from .format import TensorInfo
from .parts import Cut, Input, Part
from .sources import Sources
from .tied import Ties

__all__ = ["View", "Views"]

View = dict[str, TensorInfo]
"""Name in the output -> the tensor in its checkpoint."""


class Views:
    """Makes the views of the parts' inputs.

    Attributes:
        stacks: (index of a checkpoint, module) -> the stack of layers that slices are cut from, and how many layers it has.
    """

    def __init__(self, sources: Sources, ties: Ties, modules: tuple[str, ...], problems: Problems) -> None:
        self._sources = sources
        self._ties = ties
        self._modules = modules
        self._problems = problems
        self._whole: dict[int, View] = {}
        self._module_of: dict[int, dict[str, str]] = {}
        self._unplaced: dict[str, None] = {}
        self.stacks: dict[tuple[int, str | None], tuple[str, int] | None] = {}

    def view(self, part: Part, which: Input) -> View:
        """The tensors that an input (one that was opened) has to give to a part."""
        assert which.index is not None
        view = self._of_module(which, part.module)
        if part.cut is None:
            return view
        stack = self.stack(which, part)
        return {} if stack is None else self._cut(view, which, part.cut, *stack)

    def depths(self, part: Part) -> Callable[[str], float]:
        """Depth of a part's tensors by their names in the output: 0 to 1 over a slice, or over each stack of the first input."""
        first = part.inputs[0]
        if part.cut is None:
            return LayerDepths(self._of_module(first, part.module)).depth
        cut = part.cut

        def depth(name: str) -> float:
            layer = find_layer(name)
            if layer is None:
                return 0.0
            return (layer[1] - cut.start) / (cut.count - 1) if cut.count > 1 else 1.0

        return depth

    def warn_unplaced(self, place: Place) -> None:
        """Warn of tensors outside the layers of which it had to be guessed whether they come before or after them."""
        if self._unplaced:
            listed = ", ".join(map(repr, list(self._unplaced)[:5])) + (" ..." if len(self._unplaced) > 5 else "")
            self._problems.warn(
                place, f"neither embeddings nor what follows the layers, as far as names tell: {listed}; taken with the last slice"
            )

    def _of_module(self, which: Input, module: str | None) -> View:
        index = which.index
        if index not in self._whole:
            view: View = dict(self._sources.checkpoints[index].tensors)
            for head, embedding in self._ties.aliases.get(index, {}).items():
                view.setdefault(head, view[embedding])  # a re-ordered vocabulary brings heads of its own
            for head in self._ties.hidden:
                view.pop(head, None)
            self._whole[index] = view
            if self._modules:
                self._module_of[index] = assign_modules(self._modules, view, which.name, self._problems)
        view = self._whole[index]
        if module is None:
            return view
        return {name: info for name, info in view.items() if self._module_of[index].get(name) == module}

    def stack(self, which: Input, part: Part) -> tuple[str, int] | None:
        """The stack of layers that a part's slices are cut from, in one of its models: its name and how many layers it has."""
        key = (which.index, part.module)
        if key not in self.stacks:
            found = stacks_of(self._of_module(which, part.module))
            place = part.place[:-2]  # of all slices
            if len(found) != 1:
                listed = ", ".join(f"{name.rstrip('.')} ({count} layers)" for name, count in found.items())
                what = f"has several stacks of layers: {listed}; say which is cut, under 'modules'" if found else "has no numbered layers"
                self._problems.add(place, f"{which.name} {what}")
            self.stacks[key] = next(iter(found.items())) if len(found) == 1 else None
            first = next((s for (_, module), s in self.stacks.items() if module == part.module and s), None)
            own = self.stacks[key]
            if own and first and own[0] != first[0]:
                self._problems.add(
                    which.place, f"the layers of {which.name} are called {own[0]}N, those of the models before it {first[0]}N"
                )
                self.stacks[key] = None
        stack = self.stacks[key]
        if stack is not None and which.layers[1] > stack[1]:
            message = f"is {list(which.layers)}, and {which.name} has {stack[1]} layers ({stack[0]}0 to {stack[0]}{stack[1] - 1})"
            self._problems.add((*which.place[:-1], "layer_range"), message)
        return stack

    def _cut(self, view: Mapping[str, TensorInfo], which: Input, cut: Cut, stack: str, count: int) -> View:
        first, last = which.layers
        result: View = {}
        for name, info in view.items():
            layer = find_layer(name)
            if layer is not None:
                if first <= layer[1] < last:
                    result[f"{stack}{layer[1] - first + cut.start}{layer[2]}"] = info
            elif cut.is_first and cut.is_last:
                result[name] = info
            elif cut.is_first if side_of(name) == "before" else cut.is_last:
                result[name] = info
                if side_of(name) is None:
                    self._unplaced[name] = None
        return result
