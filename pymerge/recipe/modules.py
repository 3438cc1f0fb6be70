"""Which tensors a module of a recipe means."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .layers import stacks_of
from .problems import Problems

__all__ = ["USUAL_PREFIXES", "assign_modules"]

USUAL_PREFIXES: dict[str, tuple[str, ...]] = {
    "text_decoder": ("language_model.", "model.language_model.", "lm_head."),
    "vision_tower": ("vision_tower.", "model.vision_tower.", "visual.", "model.visual."),
    "vision_model": ("vision_model.", "model.vision_model."),
    "multi_modal_projector": (
        "multi_modal_projector.", "model.multi_modal_projector.", "visual.merger.", "model.visual.merger.",
        "model.visual.deepstack_merger_list.",
    ),
}  # fmt: skip
"""mergekit's names of modules that are no prefixes themselves, and the prefixes that they have in published checkpoints."""


def assign_modules(modules: Sequence[str], names: Iterable[str], model: str, problems: Problems) -> dict[str, str]:
    """Tensor name -> the module that has it, by the longest prefix that fits; what is wrong goes to `problems`.

    A module's name is a prefix of tensor names (up to a dot), or such a prefix without its leading ``model.``, or one of
    :data:`USUAL_PREFIXES`. ``default`` has what the others leave. A ``text_decoder`` without tensors of the usual names is a model whose
    language part has no prefix of its own, as Qwen2-VL's: it has what starts with ``model.``.

    Args:
        modules: names of the modules.
        names: of the model's tensors.
        model: what to call the model.
        problems: where everything wrong goes.
    """
    names = list(names)
    prefixes: dict[str, str] = {}
    for module in modules:
        if module == "default":
            continue
        own = [p for p in (f"{module}.", f"model.{module}.", *USUAL_PREFIXES.get(module, ())) if any(n.startswith(p) for n in names)]
        if module == "text_decoder" and set(own) <= {"lm_head."}:
            own += [p for p in ("model.",) if any(n.startswith(p) for n in names)]
        if not own:
            problems.add(("modules", module), f"no tensor of {model} belongs to it; {_described(names)}")
        prefixes.update(dict.fromkeys(own, module))
    ordered = sorted(prefixes, key=len, reverse=True)
    rest = "default" if "default" in modules else None
    result: dict[str, str] = {}
    left = []
    for name in names:
        module = next((prefixes[p] for p in ordered if name.startswith(p)), rest)
        if module is None:
            left.append(name)
        else:
            result[name] = module
    if left and len(prefixes) >= len(set(modules) - {"default"}):
        more = f" and {len(left) - 1} more" if len(left) > 1 else ""
        problems.add(("modules",), f"have no place for {left[0]!r}{more} of {model}; add a module for them, or one called default")
    return result


def _described(names: Sequence[str]) -> str:
    beginnings = dict.fromkeys(".".join(name.split(".")[:2]) if name.startswith("model.") else name.split(".")[0] for name in names)
    shown = list(beginnings)[:12]
    stacks = ", ".join(f"{stack.rstrip('.')} ({count})" for stack, count in stacks_of(names).items())
    return f"a module is named by the beginning of its tensors' names ({', '.join(shown)}); stacks of layers: {stacks or 'none'}"
