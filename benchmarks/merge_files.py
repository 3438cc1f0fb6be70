"""Time `pymerge merge` on files, beside the floor: reading every input and writing the output, with the same care for the disk.

    python benchmarks/make_checkpoints.py /tmp/bench
    python benchmarks/merge_files.py /tmp/bench                 # add --mergekit to time mergekit-yaml too

Every program runs as a process of its own; wall time includes starting Python, peak memory is the process's largest resident set.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import yaml

FLOOR = """
import os, sys
from pathlib import Path
out, inputs = Path(sys.argv[1]), [p for folder in sys.argv[2:] for p in sorted(Path(folder).glob("*.safetensors"))]
size = sum(p.stat().st_size for p in Path(sys.argv[2]).glob("*.safetensors"))
buffer = bytearray(16 << 20)
for path in inputs:
    fd = os.open(path, os.O_RDONLY)
    position = 0
    while count := os.preadv(fd, [buffer], position):
        position += count
    os.close(fd)
fd = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
view = memoryview(buffer)
while size:
    size -= os.write(fd, view[:size])
os.fsync(fd)
"""


def timed(command: list[str], cwd: Path | None = None) -> dict[str, float]:
    """Run a program: wall seconds, CPU seconds and peak resident bytes.

    The peak is measured in a small process between, whose only child the program is.
    """
    watcher = (
        "import json,resource,subprocess,sys,time;b=time.perf_counter();"
        "c=subprocess.run(sys.argv[1:],stdout=subprocess.DEVNULL).returncode;"
        "s=time.perf_counter()-b;r=resource.getrusage(resource.RUSAGE_CHILDREN);"
        "print(json.dumps(dict(rc=c,seconds=s,cpu=r.ru_utime+r.ru_stime,peak=r.ru_maxrss)))"
    )
    done = subprocess.run([sys.executable, "-c", watcher, *command], stdout=subprocess.PIPE, text=True, check=True, cwd=cwd)
    result = json.loads(done.stdout)
    if result.pop("rc"):
        sys.exit(f"failed: {' '.join(command)}")
    result["peak"] *= 1 if sys.platform == "darwin" else 1024  # kilobytes on Linux
    return result


def remove(path: Path) -> None:
    """Delete a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def measure(name: str, command: list[str], out: Path, repeat: int, cwd: Path | None = None) -> dict:
    """The fastest of `repeat` runs, each into a fresh output and with earlier writes settled on the disk."""
    runs = []
    for _ in range(repeat):
        remove(out)
        os.sync()
        runs.append(timed(command, cwd))
    best = min(runs, key=lambda run: run["seconds"])
    return {"name": name, **best, "all_seconds": [run["seconds"] for run in runs]}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="made by make_checkpoints.py")
    parser.add_argument("--recipe", default="ties.yml")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--mergekit", action="store_true", help="time mergekit-yaml once as well; it takes minutes")
    parser.add_argument("--json", type=Path, help="write the results there")
    args = parser.parse_args()
    folder = args.folder.resolve()
    recipe = yaml.safe_load((folder / args.recipe).read_text())
    models = [folder / m["model"] for m in recipe["models"]]
    if recipe.get("base_model"):
        models.insert(0, folder / recipe["base_model"])
    files = [path for model in models for path in sorted(model.glob("*.safetensors"))]
    moved = sum(path.stat().st_size for path in files) + sum(path.stat().st_size for path in models[0].glob("*.safetensors"))
    for path in files:  # warm the page cache
        path.read_bytes()

    out = folder / "out"
    floor = [sys.executable, "-c", FLOOR, str(folder / "floor.bin"), *map(str, models)]
    rows = [measure("read + write", floor, folder / "floor.bin", args.repeat)]
    remove(folder / "floor.bin")
    command = [sys.executable, "-m", "pymerge", "merge", str(folder / args.recipe), str(out)]
    rows.append(measure("pymerge merge", command, out, args.repeat))
    remove(out)
    if args.mergekit:
        script = Path(sys.executable).with_name("mergekit-yaml")
        # Its model card asks the hub about every model; there is no tokenizer to copy.
        options = ["--no-copy-tokenizer", "--no-write-model-card"]
        rows.append(measure("mergekit-yaml", [str(script), str(folder / args.recipe), str(out), *options], out, 1, cwd=folder))
        remove(out)

    print(f"{recipe['merge_method']}, {len(models)} checkpoints, {moved / 1e9:.1f} GB read and written, {os.cpu_count()} CPUs")
    print(f"{'':<18}{'seconds':>9}{'CPU s':>9}{'GB/s':>8}{'peak GB':>9}{'to floor':>10}")
    for row in rows:
        ratio = row["seconds"] / rows[0]["seconds"]
        speed, peak = moved / row["seconds"] / 1e9, row["peak"] / 1e9
        print(f"{row['name']:<18}{row['seconds']:>9.1f}{row['cpu']:>9.1f}{speed:>8.2f}{peak:>9.2f}{ratio:>10.2f}")
    if args.json:
        machine = {"cpus": os.cpu_count(), "processor": platform.processor(), "machine": platform.machine(), "system": platform.platform()}
        content = {"recipe": recipe, "bytes": moved, "machine": machine, "date": time.strftime("%Y-%m-%d"), "results": rows}
        args.json.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
