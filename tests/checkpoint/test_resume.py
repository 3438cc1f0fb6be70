"""Continuing an interrupted merge: the same bytes, or a reason why not; and never two at once."""

import fcntl
import hashlib
import json
import os
import re
import shutil
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pymerge.checkpoint import memory
from pymerge.checkpoint import resume as resume_module
from pymerge.checkpoint.format import InputChangedError
from pymerge.checkpoint.merge import merge
from pymerge.checkpoint.partial import OutputInUseError
from pymerge.checkpoint.resume import ResumeError
from pymerge.checkpoint.writer import CheckpointWriter
from pymerge.recipe import RecipeError

from .files import save_model, tensors_of, tree

RECIPE = {
    "merge_method": "ties", "base_model": "base", "models": [{"model": "a"}, {"model": "b"}],
    "parameters": {"weight": 1, "density": 0.5},
}  # fmt: skip


@pytest.fixture
def work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(memory, "BATCH", 1)  # a job per tensor
    for i, name in enumerate(("base", "a", "b")):
        save_model(tmp_path / name, tensors_of(i), 1 + i % 2)
    return tmp_path


def interrupted(recipe=RECIPE, out="out", at=5, **options):
    """A merge that Ctrl-C ends when `at` tensors are written."""
    original, count = CheckpointWriter.write, 0

    def write(self, *args):
        nonlocal count
        count += 1
        if count > at:
            raise KeyboardInterrupt
        original(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CheckpointWriter, "write", write)
        with pytest.raises(KeyboardInterrupt) as caught:
            merge(recipe, out, **options)
    return caught.value


@pytest.mark.parametrize("shard_size", ["5GB", 4000, 1])
def test_same_bytes(work, shard_size):
    merge(RECIPE, "whole", shard_size=shard_size)
    error = interrupted(shard_size=shard_size)
    assert error.__notes__ == [
        f"{work}/out.partial keeps the 5 of 12 tensors that are done (8.26 kB): "
        "the same command with --resume (resume=True) continues there"
    ]  # fmt: skip
    interrupted(shard_size=shard_size, at=3, resume=True)
    seen = []
    report = merge(RECIPE, "out", shard_size=shard_size, resume=True, progress=lambda done, total: seen.append((done, total)))
    assert tree(work / "out") == tree(work / "whole")
    assert (report.resumed, report.tensors) == (8, 12)
    total = 4 * sum(t.nbytes for t in tensors_of(0).values())
    assert seen[-1] == (total, total) and len(seen) == 4 and report.bytes_read + report.bytes_written < total
    assert sorted(p.name for p in work.iterdir()) == ["a", "b", "base", "out", "whole"]


def test_nothing_to_resume_is_a_merge(work):
    assert merge(RECIPE, "out", resume=True).resumed == 0
    with pytest.raises(RecipeError, match="exists already and is not empty"):
        merge(RECIPE, "out", resume=True)


def test_single_file(work):
    merge(RECIPE, "whole/x.safetensors")
    interrupted(out="x.safetensors")
    assert merge(RECIPE, "x.safetensors", resume=True).resumed == 5
    assert (work / "x.safetensors").read_bytes() == (work / "whole/x.safetensors").read_bytes()
    assert not (work / "x.safetensors.partial").exists()


def test_unfinished_work_is_not_thrown_away_unasked(work):
    interrupted()
    left = tree(work / "out.partial")
    with pytest.raises(RecipeError, match=r"out.partial: holds an unfinished merge; continue it with --resume \(resume=True\) or throw it"):
        merge(RECIPE, "out")
    assert tree(work / "out.partial") == left
    assert merge(RECIPE, "out", force=True).resumed == 0
    assert not (work / "out.partial").exists()


def touch(path):
    info = os.stat(path)
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns + 1))


def same_content_in_another_file(path):
    shutil.copy2(path, f"{path}.new")
    os.replace(f"{path}.new", path)


def other_config(path):
    with open(path, "a") as file:
        file.write(" ")


@pytest.mark.parametrize(
    ("change", "options", "reason"),
    [
        (None, {"recipe": {**RECIPE, "parameters": {"weight": 1, "density": 0.4}}}, "another recipe: 'density: 0.5' then, "),
        (None, {"seed": 1, "recipe": {**RECIPE, "merge_method": "dare_ties"}}, "another recipe: 'merge_method: ties' then"),
        (None, {"shard_size": 4000}, r"the output's files would be other ones \(another shard size, say\)"),
        (None, {"out_dtype": "bfloat16"}, "another recipe"),
        ((touch, "a/model-00002-of-00002.safetensors"), {}, r"a/model-00002-of-00002.safetensors has changed .*\(time of change\)"),
        ((same_content_in_another_file, "base/model.safetensors"), {}, r"base/model.safetensors has changed .*\(inode\)"),
        ((other_config, "base/tokenizer.json"), {}, "tokenizer.json would be another"),
        ((os.remove, "base/tokenizer.json"), {}, "tokenizer.json would be missing"),
    ],
)  # fmt: skip
def test_refuses_what_is_another_merge(work, change, options, reason):
    interrupted()
    left = tree(work / "out.partial")
    if change:
        change[0](change[1])
    with pytest.raises(ResumeError, match=f"out.partial: cannot be continued: .*{reason}"):
        merge(options.pop("recipe", RECIPE), "out", resume=True, **options)
    assert tree(work / "out.partial") == left, "a refusal changes nothing"
    assert not (work / "out").exists()


def test_refuses_another_version(work, monkeypatch):
    interrupted()
    monkeypatch.setattr(resume_module, "__version__", "99.0")
    with pytest.raises(ResumeError, match="it was begun by pymerge .*, this is 99.0"):
        merge(RECIPE, "out", resume=True)


def test_two_at_once(work):
    """The second is told at once, whichever way it asks; a lock whose holder died is free."""
    started, go_on = threading.Event(), threading.Event()

    def progress(done, total):
        started.set()
        go_on.wait(20)

    first = threading.Thread(target=lambda: merge(RECIPE, "out", progress=progress))
    first.start()
    assert started.wait(20)
    for options in ({}, {"resume": True}, {"force": True}):
        with pytest.raises(RecipeError, match="another process is writing it"):
            merge(RECIPE, "out", **options)
    with pytest.raises(OutputInUseError, match="out: another process is writing it"):  # one that began between the check and the start
        from pymerge.checkpoint.merge import run_plan
        from pymerge.checkpoint.plan import make_plan

        with make_plan(RECIPE) as plan:
            run_plan(plan, "out", resume=True)
    go_on.set()
    first.join()
    assert tree(work / "out") and not (work / "out.partial").exists()


def test_a_filesystem_without_locks(work, monkeypatch):
    def flock(fd, operation):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    report = merge(RECIPE, "out")
    assert any("its filesystem has no locks; make sure that nothing else writes" in warning for warning in report.warnings)


def test_a_folder_of_that_name_that_is_somebody_elses(work):
    (work / "out.partial/output").mkdir(parents=True)
    (work / "out.partial/output/thesis.tex").write_text("x")
    for options in ({}, {"resume": True}, {"force": True}):
        with pytest.raises(FileExistsError, match="out.partial: is not an unfinished output of pymerge .*move it away"):
            merge(RECIPE, "out", **options)
    assert (work / "out.partial/output/thesis.tex").read_text() == "x"
    shutil.rmtree(work / "out.partial")
    (work / "out.partial").symlink_to(work / "a")
    with pytest.raises(FileExistsError, match="is a symbolic link"):
        merge(RECIPE, "out", force=True)
    assert len(tree(work / "a")) == 5


@settings(max_examples=8)
@given(st.data())
def test_damage_to_what_was_left(work, data):
    """Whatever a crash or a person does to the unfinished files: resuming trusts what the journal and the files agree on, and is right."""
    shutil.rmtree("out", ignore_errors=True)
    shutil.rmtree("out.partial", ignore_errors=True)
    if not os.path.exists("whole"):
        merge(RECIPE, "whole", shard_size=4000)
    interrupted(shard_size=4000, at=9)
    journal, shards = work / "out.partial/journal.jsonl", sorted((work / "out.partial/output").iterdir())
    for _ in range(data.draw(st.integers(1, 3))):
        kind = data.draw(st.sampled_from(["torn", "garbage", "missing", "short"]))
        shard = data.draw(st.sampled_from(shards))
        size = journal.stat().st_size
        if kind == "torn":
            first = journal.read_bytes().find(b"\n") + 1
            os.truncate(journal, data.draw(st.integers(first, size)))
        elif kind == "garbage":
            with open(journal, "ab") as file:
                file.write(data.draw(st.binary(max_size=40)))
        elif kind == "missing":
            shard.unlink(missing_ok=True)
        elif kind == "short" and shard.exists():
            os.truncate(shard, data.draw(st.integers(0, shard.stat().st_size)))
    interrupted(shard_size=4000, at=1, resume=True)  # a second crash must not make the first one's loss look like work done
    merge(RECIPE, "out", resume=True, shard_size=4000)
    assert tree(work / "out") == tree(work / "whole")


def test_a_journal_that_claims_too_much(work):
    """By hand, or of another run: what it says of tensors that are not there is not believed."""
    merge(RECIPE, "whole", shard_size=4000)
    interrupted(shard_size=4000, at=9)
    shutil.move("out.partial", "other.partial")
    interrupted(shard_size=4000, at=2)
    journal = work / "out.partial/journal.jsonl"
    text = journal.read_text()
    mark = re.search('"done":{"([0-9a-f]+)"', text)[1]
    journal.write_text(text.replace(f'"{mark}":[', f'"{mark}":["model.norm.weight",'))
    interrupted(shard_size=4000, at=3, resume=True)
    shutil.copy("other.partial/journal.jsonl", journal)
    merge(RECIPE, "out", resume=True, shard_size=4000)
    assert tree(work / "out") == tree(work / "whole")


def test_a_journal_whose_beginning_is_damaged(work):
    interrupted()
    journal = work / "out.partial/journal.jsonl"
    journal.write_bytes(b"x" + journal.read_bytes())
    left = tree(work / "out.partial")
    for options in ({}, {"resume": True}, {"force": True}):
        with pytest.raises(
            FileExistsError, match="out.partial: cannot be continued, its journal.jsonl is damaged; remove it to start over"
        ):
            merge(RECIPE, "out", **options)
    assert tree(work / "out.partial") == left


def test_what_somebody_put_among_the_files(work):
    """It would get the output's name with them."""
    interrupted()
    (work / "out.partial/output/notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="out.partial/output: holds 'notes.txt', which is not of this merge; move it away") as caught:
        merge(RECIPE, "out", resume=True)
    assert "out.partial keeps the 12 of 12 tensors that are done" in caught.value.__notes__[0]
    shutil.move("out.partial/output/notes.txt", "notes.txt")
    assert merge(RECIPE, "out", resume=True).resumed == 12
    interrupted(out="new")
    shutil.move("new.partial/output", "elsewhere")
    (work / "new.partial/output").symlink_to("../elsewhere")
    with pytest.raises(FileExistsError, match="new.partial/output: is a symbolic link"):
        merge(RECIPE, "new", resume=True)


def sha256(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_hashes_of_inputs(work):
    merge(RECIPE, "out", verify=True)
    content = json.loads((work / "out/pymerge.json").read_text())
    files = {(i["model"], f["name"]): f["sha256"] for i in content["inputs"] for f in i["files"]}
    assert files == {(m, p.name): sha256(p) for m in ("base", "a", "b") for p in (work / m).glob("*.safetensors")}
    merge(RECIPE, "without")
    assert "sha256" not in (work / "without/pymerge.json").read_text()


def test_hashes_are_compared_when_resuming(work):
    """A change that keeps size, time and inode shows."""
    interrupted(verify=True, at=11)
    path = work / "base/model.safetensors"
    assert sha256(path) in (work / "out.partial/journal.jsonl").read_text()
    info = path.stat()
    with open(path, "r+b") as file:
        file.seek(-2, os.SEEK_END)
        file.write(b"xx")
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns))
    with pytest.raises(InputChangedError, match="base/model.safetensors: its SHA-256 is .*, but an earlier run of this merge says"):
        merge(RECIPE, "out", resume=True, verify=True)
    assert not (work / "out.partial").exists() and not (work / "out").exists()


def test_hashes_are_compared_with_the_cache(work):
    """The hub's cache keeps files under their SHA-256, with links to them: reading through such links is fine, a wrong name is not."""
    repository = work / "models--org--a"
    (repository / "snapshots").mkdir(parents=True)
    (repository / "blobs").mkdir()
    shutil.move(work / "a", repository / "snapshots/1234")
    recipe = {**RECIPE, "models": [{"model": "models--org--a/snapshots/1234"}, {"model": "b"}]}
    path = repository / "snapshots/1234/model-00001-of-00002.safetensors"
    for name in (sha256(path), "0" * 64):
        blob = repository / "blobs" / name
        shutil.move(path.resolve(), blob)
        path.unlink(missing_ok=True)
        path.symlink_to(os.path.join("../../blobs", name))
        if name.startswith("00"):
            with pytest.raises(InputChangedError, match="its name in the cache says 00000"):
                merge(recipe, "out", verify=True)
        else:
            merge(recipe, "good", verify=True)


def test_same_folder_wherever_and_however(work, monkeypatch):
    """Names, places, the current folder, threads and resuming leave no trace in the output, not in any file."""
    (work / "r.json").write_text(json.dumps(RECIPE))
    merge("r.json", "out", verify=True)
    expected = tree(work / "out")
    assert len(expected) == 5
    (work / "elsewhere").mkdir()
    monkeypatch.chdir(work / "elsewhere")
    merge("../r.json", "another name", verify=True, threads=3)
    assert tree(work / "elsewhere/another name") == expected
    merge(work / "r.json", work / "deep/er/x", verify=True, threads=1)
    assert tree(work / "deep/er/x") == expected
    interrupted("../r.json", "third", verify=True)
    merge("../r.json", "third", verify=True, resume=True)
    assert tree(work / "elsewhere/third") == expected
    monkeypatch.setattr(memory, "BATCH", 10**6)
    merge("../r.json", "fourth", verify=True)
    assert tree(work / "elsewhere/fourth") == expected
    assert not [name for name, content in expected.items() if str(work).encode() in content]
