"""What a verification finds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .inputs import sha256_of

__all__ = ["VerifyReport", "files_differ"]


@dataclass(frozen=True)
class VerifyReport:
    """What a verification found.

    Attributes:
        out: the checkpoint that was verified.
        tensors: how many it has.
        checked: names of those that were merged again.
        differences: (tensor, what differs), in the order of the merge; empty when everything checked is as it should be.
        inputs: what is wrong with the inputs: a file of another size or hash than the one that was merged.
        version: of pymerge, by which the output says it was made.
    """

    out: Path
    tensors: int
    checked: tuple[str, ...]
    differences: tuple[tuple[str, str], ...]
    inputs: tuple[str, ...]
    version: str

    @property
    def ok(self) -> bool:
        """Nothing differs."""
        return not self.differences and not self.inputs


def files_differ(model: str, before: Sequence[tuple[str, int, str | None]], now: Sequence[Path], hashes: bool) -> list[str]:
    """What is no longer as it was recorded, for people.

    Args:
        model: what the files are of.
        before: (name, bytes, SHA-256 or None) of each file.
        now: where they are.
        hashes: compare the SHA-256, which reads the files.
    """
    names, names_now = [name for name, _, _ in before], [file.name for file in now]
    if names != names_now:  # in order: a model that is put together from several may have two files of one name
        return [f"{model}: its files were {', '.join(names)}, and are {', '.join(names_now)}"]
    found = []
    for file, (_, nbytes, digest) in zip(now, before, strict=True):
        size = file.stat().st_size
        if size != nbytes:
            found.append(f"{file}: has {size} bytes; the file that was merged had {nbytes}")
        elif hashes and digest is not None and (digest_now := sha256_of(file)) != digest:
            found.append(f"{file}: its SHA-256 is {digest_now}; that of the file that was merged was {digest}")
    return found
