"""Commands, and what becomes of errors. Commands are imported when they are run: `pymerge --help` loads neither torch nor rich."""

from __future__ import annotations

import gc
import importlib
import os
import signal
import sys
import threading

import click

from .._version import __version__
from .errors import INTERRUPTED, REFUSED, Explanation, explain, notes_of
from .text import print_json, printable

__all__ = ["Terminated", "main"]

COMMANDS = ("merge", "plan", "diagnose", "inspect", "diff", "verify", "lora", "methods", "report", "bench", "env", "completion")

HELP = """Merge the weights of neural networks that share a base: checkpoint files in, a checkpoint file out.

\b
  pymerge plan recipe.yml            check a recipe, see what it would do
  pymerge merge recipe.yml out/      do it
  pymerge inspect out/               see what is in a checkpoint
  pymerge diff out/ base/            see how far it is from another one

Recipes are YAML files in mergekit's format; `pymerge methods` lists the methods and their parameters. A recipe of three lines:

\b
  merge_method: linear
  models: [{model: ./a}, {model: ./b}]
  parameters: {weight: 0.5}
"""

EPILOG = """\b
Exit status: 0 done, 1 the merge failed while it ran (diff: there are
differences), 2 bad usage, recipe or input (nothing was started),
130 interrupted. Whatever happens, the output appears complete or not at all.
"""


class Terminated(KeyboardInterrupt):
    """SIGTERM: everything is unwound as for Ctrl-C."""


class _LazyGroup(click.Group):
    """A group whose commands are modules of this package."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        return importlib.import_module(f".{cmd_name}", __package__).command

    def resolve_command(self, ctx: click.Context, args: list[str]):
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            import difflib

            near = difflib.get_close_matches(args[0], COMMANDS, n=1)
            if near:
                error.message += f" Did you mean {near[0]!r}?"
            elif args[0].endswith((".yml", ".yaml", ".json")):
                error.message += f" To merge by a recipe: pymerge merge {args[0]} OUT"
            raise


@click.group(cls=_LazyGroup, help=HELP, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, "-V", "--version", message="pymerge %(version)s")
def _group() -> None:
    pass


def main(args: list[str] | None = None, prog_name: str = "pymerge") -> None:
    """Run the command line and exit.

    Args:
        args: arguments without the program's name; those of the process by default.
        prog_name: how the program calls itself in its help.
    """
    own_process = args is None
    if own_process:
        # torch makes a million objects that stay. Looking through them again and again while it is imported is a tenth of the time, once
        # more at exit a quarter of it.
        gc.set_threshold(100_000)
    args = sys.argv[1:] if args is None else list(args)
    as_json = "--json" in args[: args.index("--")] if "--" in args else "--json" in args
    if threading.current_thread() is threading.main_thread():
        # The default would leave the unfinished output behind; this unwinds as Ctrl-C does.
        signal.signal(signal.SIGTERM, _terminate)
    try:
        result = _group.main(args=args, prog_name=prog_name, standalone_mode=False)
        code = result if isinstance(result, int) else 0  # click returns the status that a command exits with
    except click.ClickException as error:
        if as_json:
            _tell(Explanation("usage", error.format_message(), REFUSED), as_json)
        else:
            error.show()
        code = error.exit_code
    except (click.Abort, KeyboardInterrupt) as error:
        cause = error if isinstance(error, KeyboardInterrupt) else error.__cause__  # click makes an Abort of Ctrl-C
        code = 128 + signal.SIGTERM if isinstance(cause, Terminated) else INTERRUPTED
        _tell(Explanation("interrupted", "interrupted", code, notes=notes_of(cause)), as_json)
    except BrokenPipeError:
        # Whoever read our output has gone. Python would complain once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    except Exception as error:
        explanation = explain(error)
        if explanation is None:
            raise
        _tell(explanation, as_json)
        code = explanation.status
    if own_process:
        gc.freeze()
    sys.exit(code)


def _tell(explanation: Explanation, as_json: bool) -> None:
    if as_json:
        print_json("error/1", explanation.as_dict())
        return
    before = "" if explanation.kind in ("recipe", "interrupted") else "error: "
    click.echo(f"{before}{printable(explanation.message)}", err=True)
    for note in explanation.notes:
        click.echo(note, err=True)


def _terminate(number: int, frame: object) -> None:
    raise Terminated
