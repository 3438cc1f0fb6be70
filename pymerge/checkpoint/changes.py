"""What the output's small files say differently from the donor's: number of layers, tied head, vocabulary, chat template."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..recipe.chat_templates import AUTO, template_text
from ..recipe.problems import Problems
from .extras import read_json, read_small
from .format import CheckpointError
from .sources import Sources

__all__ = ["Changes", "choose_chat_template", "layer_changes"]

Keys = tuple[str, ...]
"""("text_config", "num_hidden_layers"): a place in config.json."""

_LAYER_KEYS = (
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "depth", "encoder_layers", "decoder_layers", "num_encoder_layers",
    "num_decoder_layers",
)  # fmt: skip


@dataclass(frozen=True)
class Changes:
    """Changes to the donor's files.

    Attributes:
        config: places in config.json -> values.
        chat_template: Jinja text, None to leave what there is.
    """

    config: Mapping[Keys, Any] = field(default_factory=dict)
    chat_template: str | None = None

    def apply(self, files: dict[str, bytes]) -> None:
        """Change the contents of `files` (name -> content)."""
        if self.config and "config.json" in files:
            config = json.loads(files["config.json"])
            for keys, value in self.config.items():
                inner = config
                for key in keys[:-1]:
                    inner = inner.setdefault(key, {})
                inner[keys[-1]] = value
            files["config.json"] = _text(config)
        if self.chat_template is not None:
            # Newer versions of transformers read the file of its own, older ones the key.
            files["chat_template.jinja"] = self.chat_template.encode()
            files.pop("chat_template.json", None)
            if "tokenizer_config.json" in files:
                tokenizer = json.loads(files["tokenizer_config.json"])
                files["tokenizer_config.json"] = _text({**tokenizer, "chat_template": self.chat_template})


def _text(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def layer_changes(
    config: Mapping[str, Any] | None,
    stack: str,
    count: int,
    module: str | None,
    slices: Sequence[tuple[Mapping[str, Any] | None, int, int]],
) -> dict[Keys, Any]:
    """Changes to config.json for a stack of layers that is put together anew.

    The key with the number of layers is recognised by its name and by its value; lists with an item per layer (``layer_types``) are put
    together as the layers are.

    Args:
        config: the donor's.
        stack: its layers' name, "model.layers.".
        count: how many the donor has.
        module: name of the recipe's module, if any.
        slices: for each slice: config.json of its first source, that source's first layer and the one after its last.

    Raises:
        ValueError: it cannot be told what to change.
    """
    if config is None:
        return {}
    total = sum(last - first for _, first, last in slices)
    places = _layer_keys(config, count, f"{module or ''}.{stack}")
    if not places and total != count:
        raise ValueError(
            f"config.json has no key with the number of layers of {stack.rstrip('.')}, which is {count}; {total} cannot be set"
        )
    changes: dict[Keys, Any] = {place: total for place in places}
    for outer in dict.fromkeys(place[:-1] for place in places):
        for key, value in _at(config, outer).items():
            if not (isinstance(value, list) and len(value) == count and "layer" in key and all(isinstance(v, str) for v in value)):
                continue
            joined = []
            for source, first, last in slices:
                own = _at(source or {}, outer).get(key)
                if not isinstance(own, list) or len(own) < last:
                    raise ValueError(f"config.json has a list {key!r} with an item per layer, which that of another slice's model lacks")
                joined += own[first:last]
            changes[(*outer, key)] = joined
    return {keys: value for keys, value in changes.items() if _at(config, keys[:-1])[keys[-1]] != value}


def _at(config: Mapping[str, Any], keys: Keys) -> Mapping[str, Any]:
    for key in keys:
        config = config.get(key, {})
    return config


def _layer_keys(config: Mapping[str, Any], count: int, subject: str) -> list[Keys]:
    """Places of the number of layers of the stack that `subject` describes."""
    found = [keys for keys in _walk(config, ()) if keys[-1] in _LAYER_KEYS and _at(config, keys[:-1])[keys[-1]] == count]
    for words, other in ((("vision", "visual"), "vision"), (("decoder",), "decoder"), (("encoder",), "encoder"), (("audio",), "audio")):
        own = [keys for keys in found if other in ".".join(keys)]
        if any(word in subject for word in words):
            found = own or found
        else:
            found = [keys for keys in found if keys not in own]
    return found


def _walk(config: Mapping[str, Any], above: Keys) -> list[Keys]:
    places = []
    for key, value in config.items():
        places += _walk(value, (*above, key)) if isinstance(value, dict) else [(*above, key)]
    return places


def choose_chat_template(value: str | None, sources: Sources, problems: Problems) -> str | None:
    """The chat template that a recipe asks for; "auto" is the one that most models have, of equals the first."""
    if value is None or not sources.complete:
        return None
    if value != AUTO:
        return template_text(value)
    found: Counter[str] = Counter()
    for index, store in enumerate(sources.checkpoints):
        try:
            template = _template_of(store.folder)
        except CheckpointError as error:
            problems.add(sources.places[index], str(error))
            continue
        if template:
            found[template.strip()] += 1
    if not found:
        problems.warn(("chat_template",), "no model has a chat template, so there is none to choose")
        return None
    return found.most_common(1)[0][0]


def _template_of(folder: Path | None) -> str | None:
    """A model folder's chat template: of its own file or of tokenizer_config.json; of several, the one called default."""
    if folder is None:
        return None
    if (folder / "chat_template.jinja").is_file():
        return read_small(folder / "chat_template.jinja").decode("utf-8", "replace")
    for name in ("tokenizer_config.json", "chat_template.json"):
        given = (read_json(folder / name) or {}).get("chat_template")
        if isinstance(given, list):
            given = next((t.get("template") for t in given if isinstance(t, dict) and t.get("name") == "default"), None)
        if isinstance(given, str):
            return given
    return None
