"""Models by their id on the Hugging Face hub: from the local cache, and from the network only when that was allowed."""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["hub_snapshot", "is_hub_id"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken")
_PICKLED = ("*.bin",)
_UNWANTED = ("*/*", "consolidated*")
"""Other formats' folders (original/, onnx/), and the second copy of the weights that some publishers add."""


def is_hub_id(text: str) -> bool:
    """Whether `text` has the form ``organisation/model``."""
    return _HUB_ID.fullmatch(text) is not None


def hub_snapshot(name: str, revision: str | None, download: bool) -> Path:
    """The folder with the files of a model on the hub.

    Args:
        name: ``organisation/model``.
        revision: branch, tag or commit; None for main.
        download: fetch what is not in the cache (``HF_HOME`` and ``HF_TOKEN`` count as in every program of Hugging Face's).

    Raises:
        LookupError: it is not there; says what to do.
    """
    try:
        import huggingface_hub
        from huggingface_hub.errors import LocalEntryNotFoundError
    except ImportError:
        raise LookupError("is no path here, and hub ids need the package huggingface_hub: pip install 'pymerge-kernels[hub]'") from None
    at = f" at revision {revision!r}" if revision else ""
    try:
        folder = Path(huggingface_hub.snapshot_download(name, revision=revision, local_files_only=True))
        missing = "" if _has_weights(folder) else f"the Hugging Face cache has no weights of it{at}"
    except LocalEntryNotFoundError:
        missing = f"not in the Hugging Face cache{at}"
    except (OSError, ValueError) as error:
        raise LookupError(f"cannot be looked up in the Hugging Face cache: {_first_line(error)}") from None
    if not download:
        if not missing:
            return folder
        raise LookupError(
            f"is no path here and {missing}; models are fetched only when asked for: --download (in Python, download=True) does it"
        )
    try:
        folder = Path(huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=_FILES, ignore_patterns=_UNWANTED))
        if not _has_weights(folder):
            huggingface_hub.snapshot_download(name, revision=revision, allow_patterns=_PICKLED, ignore_patterns=_UNWANTED)
    except Exception as error:  # the network's, the hub's and the disk's; nothing has been read or written by us
        raise LookupError(f"cannot be downloaded: {_first_line(error)}") from None
    return folder


def _has_weights(folder: Path) -> bool:
    return any(any(folder.glob(pattern)) for pattern in ("*.safetensors", *_PICKLED))


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
