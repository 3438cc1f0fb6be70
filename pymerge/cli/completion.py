"""`pymerge completion`."""

from __future__ import annotations

import click
from click.shell_completion import get_completion_class

__all__ = ["command"]

_VARIABLE = "_PYMERGE_COMPLETE"  # click derives it from the program's name


@click.command("completion", short_help="Print a script that lets a shell complete pymerge's commands.")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def command(shell) -> None:
    """Print a script with which SHELL completes pymerge's commands, options and files.

    \b
    bash:  echo 'eval "$(pymerge completion bash)"' >> ~/.bashrc
    zsh:   echo 'eval "$(pymerge completion zsh)"' >> ~/.zshrc
    fish:  pymerge completion fish > ~/.config/fish/completions/pymerge.fish
    """
    from .main import _group

    click.echo(get_completion_class(shell)(_group, {}, "pymerge", _VARIABLE).source())
