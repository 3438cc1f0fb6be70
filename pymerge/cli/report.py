"""`pymerge report`."""

from __future__ import annotations

from pathlib import Path

import click

from .options import as_json
from .text import print_json

__all__ = ["command"]


@click.command("report", short_help="What training forgot: metrics, and a gate against regressions.")
@click.argument("results", nargs=-1, required=True, type=click.Path(exists=True))
@click.option(
    "--margin", type=float, help="The drop that would matter: compare the last result with the first and say if it can be excluded."
)
@click.option("--alpha", type=float, default=0.05, show_default=True, help="One-sided error of the gate, over all probes.")
@click.option("--critical", multiple=True, metavar="TASK", help="A task that must not be inconclusive; may be given again.")
@click.option("--introduced", multiple=True, metavar="TASK=STAGE", help="The stage that trains a task; tasks not named are old abilities.")
@click.option("--plot", type=click.Path(dir_okay=False), help="Draw stages by tasks into this file (.png, .pdf, .svg).")
@as_json
def command(results, margin, alpha, critical, introduced, plot, as_json) -> int:
    """Report on RESULTS: one JSON file with a result matrix, or the result files or folders of lm-evaluation-harness, one for each stage in
    the order of training.

    With --margin, the last stage is compared with the first, item by item where samples were logged. Exit status then: 0 all probes passed,
    1 one dropped, 3 nothing certain. Runs that did not measure the same (versions, shots, limits) are refused.
    """
    from ..metrics import RegressionGate, ResultMatrix, load_lm_eval
    from ..metrics.lm_eval import matrix_of, probes_of
    from ..metrics.report import as_dict, as_text

    gate = None
    try:
        if len(results) == 1 and Path(results[0]).is_file():
            matrix = ResultMatrix.load(results[0])
            if margin is not None:
                raise ValueError("--margin needs the results of lm-evaluation-harness: a matrix has no scores by item")
        else:
            runs = _by_stage([load_lm_eval(path) for path in results], results)
            matrix = matrix_of(runs, dict(_pair(text) for text in introduced))
            if margin is not None:
                if len(runs) < 2:
                    raise ValueError("--margin compares two results or more; give the old one first")
                first, *_, last = runs.values()
                probes = probes_of(first, last)
                for task in probes.unjudged:
                    click.echo(f"{task}: has no standard error and no logged samples, so the gate cannot judge it", err=True)
                gate = RegressionGate(margin, alpha=alpha, critical=critical, higher_is_better=probes.higher_is_better)
                gate = gate.compare(probes.old, probes.new)
        if plot:
            from ..metrics.plots import heatmap

            heatmap(matrix).savefig(plot, dpi=150)
    except (ValueError, OSError) as error:
        raise click.UsageError(str(error)) from None
    except ModuleNotFoundError as error:
        raise click.UsageError(f'{error.name} is not installed: pip install "pymerge-kernels[report]"') from None
    if as_json:
        print_json("report/1", as_dict(matrix, gate))
    else:
        click.echo(as_text(matrix, gate), nl=False)
    return gate.exit_code if gate else 0


def _pair(text: str) -> tuple[str, str]:
    task, equals, stage = text.partition("=")
    if not (task and equals and stage):
        raise ValueError(f"--introduced is {text!r}; write TASK=STAGE")
    return task, stage


def _by_stage(runs, paths) -> dict:
    """Runs by a name that tells them apart: the folder's, or the path."""
    names = [Path(path).stem if Path(path).is_file() else Path(path).resolve().name for path in paths]
    return dict(zip(names if len(set(names)) == len(names) else paths, runs))
