"""Writes the table of speeds into README.md, between its markers, from the newest result file (or the one that is named).

python benchmarks/readme_table.py [benchmarks/results/FILE.json]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import speed_table

ROOT = Path(__file__).parent.parent
BEGIN, END = "<!-- speeds: begin -->", "<!-- speeds: end -->"
SHOWN = (("64M", "bf16"),)  # all sizes would be a screenful; the rest is in the result file


def main(arguments: list[str]) -> None:
    results = sorted((ROOT / "benchmarks/results").glob("*.json"))
    file = Path(arguments[0]) if arguments else next((f for f in reversed(results) if _rows(f)), None)
    if file is None:
        raise SystemExit("no result in benchmarks/results; run make bench first")
    rows = [row for row in _rows(file) if (row["elements"], row["dtype"]) in SHOWN]
    readme = ROOT / "README.md"
    before, rest = readme.read_text().split(BEGIN)
    after = rest.split(END)[1]
    table = speed_table.markdown(rows, json.loads(file.read_text())["machine_info"])
    readme.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}")
    print(f"README.md: {len(rows)} rows from {file.name}")


def _rows(file: Path) -> list[dict]:
    """The merge speeds in a file of benchmarks/results; none when it holds other results."""
    data = json.loads(file.read_text())
    benchmarks = data.get("benchmarks", []) if isinstance(data, dict) else []
    return [b["extra_info"] for b in benchmarks if "copy_ms" in b.get("extra_info", {})]


if __name__ == "__main__":
    main(sys.argv[1:])
