"""Files of a model folder that are symbolic links: which may be followed.

A folder that came from somebody else must not make a merge read, or copy into its output, what lies elsewhere on this machine: a
tokenizer.json that is a link to a private key would be published with the merged model. The Hugging Face cache stores every file
as a link, though, from ``snapshots/<revision>/`` into ``blobs/`` of the same model.
"""

from __future__ import annotations

from pathlib import Path

from .format import CheckpointError

__all__ = ["check_link"]


def check_link(file: Path) -> None:
    """
    Raises:
        CheckpointError: `file` is a link to somewhere outside of its folder, and not as the Hugging Face cache has them.
    """
    if not file.is_symlink():
        return
    folder = file.parent.resolve()
    try:
        target = file.resolve()
    except (OSError, RuntimeError):  # a chain of links that never ends
        raise CheckpointError(f"{file}: is a symbolic link that leads nowhere") from None
    if target.is_relative_to(folder):
        return
    repository = next((parent.parent for parent in (folder, *folder.parents) if parent.parent.name == "snapshots"), folder).parent
    if repository != folder.parent and target.parent == repository / "blobs":
        return
    raise CheckpointError(
        f"{file}: is a symbolic link to {target}, outside of its folder. Such links are followed in the Hugging Face cache only; copy the "
        "file here, or name the folder that it lies in"
    )
