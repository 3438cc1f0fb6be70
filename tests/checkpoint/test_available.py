"""What control groups leave of the memory, from files as Linux has them in containers, jobs and plain systems."""

from pathlib import Path

import pytest

from pymerge.checkpoint import available, budget
from pymerge.checkpoint.available import memory_left

GB = 10**9
NONE = 2**63 - 4096
V2 = "30 23 0:26 {root} /sys/fs/cgroup rw,nosuid,nodev,noexec,relatime shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = "35 31 0:32 {root} /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n34 31 0:31 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n"
ROOT_FS = "23 28 0:22 / /sys rw,nosuid,nodev,noexec,relatime shared:7 - sysfs sysfs rw\n"


def system(folder: Path, mounts: str, groups: str, files: dict[str, str]) -> Path:
    (folder / "proc/self").mkdir(parents=True)
    (folder / "proc/self/mountinfo").write_text(ROOT_FS + mounts)
    (folder / "proc/self/cgroup").write_text(groups)
    for name, content in files.items():
        path = folder / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content + "\n")
    return folder


def v2(at: str, limit: object, use: int, cached: int = 0, high: object = "max") -> dict[str, str]:
    stat = f"anon {use - cached}\nfile {cached + 5}\ninactive_file {cached - cached // 4}\nactive_file {cached // 4}\nslab 77"
    return {f"{at}memory.max": str(limit), f"{at}memory.high": str(high), f"{at}memory.current": str(use), f"{at}memory.stat": stat}


def v1(at: str, limit: object, use: int, cached: int = 0) -> dict[str, str]:
    stat = f"cache {cached}\ninactive_file 1\ntotal_inactive_file {cached - 10}\ntotal_active_file 10"
    start = f"memory/{at}"
    return {f"{start}memory.limit_in_bytes": str(limit), f"{start}memory.usage_in_bytes": str(use), f"{start}memory.stat": stat}


CASES = {
    "no limit": (V2.format(root="/"), "0::/user.slice\n", v2("user.slice/", "max", GB), None),
    "the root has no files": (V2.format(root="/"), "0::/\n", {"cgroup.procs": ""}, None),
    "a container sees its own group as the root": (V2.format(root="/"), "0::/\n", v2("", 2 * GB, GB // 2), 3 * GB // 2),
    "page cache is given back": (V2.format(root="/"), "0::/\n", v2("", 2 * GB, 2 * GB - 5, cached=GB), GB + 5),
    "a group above is narrower": (
        V2.format(root="/"), "0::/system.slice/job/step\n",
        {**v2("system.slice/", "max", 9 * GB), **v2("system.slice/job/", 8 * GB, 7 * GB), **v2("system.slice/job/step/", 4 * GB, GB)}, GB,
    ),
    "another job's limit is not ours": (V2.format(root="/"), "0::/a\n", {**v2("a/", "max", 1), **v2("b/", GB, 1)}, None),
    "throttled above": (V2.format(root="/"), "0::/\n", v2("", 8 * GB, GB, high=3 * GB), 2 * GB),
    "more in use than allowed": (V2.format(root="/"), "0::/\n", v2("", GB, 2 * GB), 0),
    "the mounted group is the container's, as docker has it without a namespace": (
        V2.format(root="/docker/7f"), "0::/docker/7f/inner\n", {**v2("", 6 * GB, 0), **v2("inner/", 5 * GB, 0)}, 5 * GB,
    ),
    "outside of what is mounted": (V2.format(root="/"), "0::/../other\n", v2("", 6 * GB, GB), 5 * GB),
    "a name that begins alike": (V2.format(root="/a"), "0::/ab/c\n", {**v2("", 6 * GB, 0), **v2("b/c/", GB, 0)}, 6 * GB),
    "version 1": (V1.format(root="/"), "4:memory:/job\n3:cpu,cpuacct:/x\n0::/\n", v1("job/", 3 * GB, 2 * GB, cached=GB), 2 * GB),
    "version 1 without a limit": (V1.format(root="/"), "4:memory:/job\n", {**v1("", NONE, GB), **v1("job/", NONE, GB)}, None),
    "version 1, nested": (V1.format(root="/"), "4:memory:/a/b\n", {**v1("a/", 3 * GB, GB), **v1("a/b/", NONE, GB)}, 2 * GB),
    "version 1, in docker": (V1.format(root="/docker/7f"), "4:memory:/docker/7f\n", v1("", 2 * GB, GB), GB),
    "both versions, as with systemd's hybrid mode": (
        V1.format(root="/") + V2.format(root="/").replace("/sys/fs/cgroup ", "/sys/fs/cgroup/unified "), "4:memory:/j\n0::/j\n",
        {**v1("j/", 4 * GB, GB), "unified/j/cgroup.procs": ""}, 3 * GB,
    ),
    "files that make no sense": (V2.format(root="/"), "nonsense\n0::/\n", {**v2("", "lots", 0), "memory.stat": "x"}, None),
    "statistics that make no sense": (V2.format(root="/"), "0::/\n", {**v2("", GB, 10), "memory.stat": "inactive_file many"}, GB - 10),
    "a mount with a blank in its name": (
        V2.format(root="/").replace("/sys/fs/cgroup ", r"/sys/fs/cgroup/a\040b "), "0::/\n", v2("a b/", GB, 0), GB
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_is_left(tmp_path, case):
    mounts, groups, files, expected = CASES[case]
    assert memory_left(system(tmp_path, mounts, groups, files)) == expected


def test_not_linux(tmp_path):
    assert memory_left(tmp_path) is None


@pytest.mark.parametrize(
    ("left", "expected"), [(None, None), (2 * GB, GB // 2), (40 * 10**6, budget.LEAST_MEMORY), (10**15, None), (0, budget.LEAST_MEMORY)]
)
def test_the_default_budget(monkeypatch, left, expected):
    """A quarter of what is left, or of the machine's memory, 4 GB at most."""
    monkeypatch.setattr(budget, "memory_left", lambda: left)
    monkeypatch.setattr(budget.os, "sysconf", lambda name: 2**22 if name == "SC_PHYS_PAGES" else 4096)
    assert budget.default_memory() == (4 * GB if expected is None else expected)
    monkeypatch.setattr(budget.os, "sysconf", lambda name: 2**18 if name == "SC_PHYS_PAGES" else 4096)
    assert budget.default_memory() <= 2**28


def test_this_machine():
    left = available.memory_left()
    assert left is None or left >= 0
