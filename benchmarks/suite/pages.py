"""Writes the tables in README.md and docs/benchmarks.md from a result file: python -m benchmarks.suite.pages [FILE]

Between the markers stands what `rendered` makes of the file that is named there, so a test can say whether they still agree.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

from .table import bandwidth_markdown, legend, markdown

__all__ = ["BLOCKS", "block", "newest_result", "rendered", "source"]

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
SCHEMA = "pymerge-suite/1"


def _speeds(result: dict, name: str) -> str:
    """The full comparison, and the divergences."""
    main = [row for row in result["rows"] if row["group"] == "main"]
    first = main[0]
    logits = [row for row in result["rows"] if row["group"] == "kl 32k" and row["threads"] == result["machine"]["cores"]]
    models = max(row["models"] for row in main)
    about = f"{first['elements'] / 2**20:.0f}M elements, {first['dtype']}, {models} models (wise_ft, ema, slerp: one)"
    about += ", density 0.2 for TIES, 0.5 for DARE"
    if logits:
        shape = logits[0]["layout"]
        logits = list({row["method"]: row for row in logits if row["layout"] == shape}.values())
        about += f"; kl: value and gradient of {shape} logits"
    return f"{markdown([*main, *logits], readme=True)}\n\n{about}.\n{legend(result)}\nFrom `benchmarks/results/{name}`."


def _all(result: dict, name: str) -> str:
    """Every row, in a table for each group of them."""
    titles = {
        "main": "Everything at one size", "kl": "Divergences, value and gradient", "llama": "The tensors of a Llama, scaled down",
        "thousand": "A thousand tensors", "lora": "A LoRA", "size": "Sizes", "dtype": "Dtypes", "models": "Number of models",
        "density": "Density", "threads": "Threads",
    }  # fmt: skip
    by_title: dict[str, list[dict]] = {}
    for row in result["rows"]:
        by_title.setdefault(titles[row["group"].split()[0]], []).append(row)
    parts = [f"{legend(result)}\nFrom `benchmarks/results/{name}`.", "### The memory, GB/s", bandwidth_markdown(result["bandwidth"])]
    for title, rows in by_title.items():
        parts += [f"### {title}", markdown(rows)]
    return "\n\n".join(parts)


BLOCKS: dict[str, tuple[Path, str, str, Callable[[dict, str], str]]] = {
    "README": (ROOT / "README.md", "<!-- speeds: begin -->", "<!-- speeds: end -->", _speeds),
    "benchmarks": (ROOT / "docs" / "benchmarks.md", "<!-- results: begin -->", "<!-- results: end -->", _all),
}
"""Page, markers, and what stands between them."""


def newest_result() -> Path:
    """The newest result of the whole suite.

    Raises:
        SystemExit: there is none.
    """
    for path in sorted(RESULTS.glob("*.json"), reverse=True):
        content = json.loads(path.read_text())
        if isinstance(content, dict) and content.get("schema") == SCHEMA:
            return path
    raise SystemExit(f"no result of the suite in {RESULTS}; run make bench first")


def rendered(block_name: str, file: Path) -> str:
    """What the block should be, from a result file."""
    return BLOCKS[block_name][3](json.loads(file.read_text()), file.name)


def block(block_name: str) -> str:
    """What stands between the markers."""
    page, begin, end, _ = BLOCKS[block_name]
    return page.read_text().split(begin)[1].split(end)[0].strip("\n")


def source(block_name: str) -> Path:
    """The result file that the block names."""
    return RESULTS / re.search(r"From `benchmarks/results/([^`]+)`", block(block_name)).group(1)


def main(arguments: list[str]) -> int:
    file = Path(arguments[0]) if arguments else newest_result()
    for name, (page, begin, end, _) in BLOCKS.items():
        before, rest = page.read_text().split(begin)
        page.write_text(f"{before}{begin}\n{rendered(name, file)}\n{end}{rest.split(end)[1]}")
        print(f"{page.relative_to(ROOT)}: from {file.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
