"""Names of models: paths, hub ids, revisions and adapters, in both forms."""

import json
import sys

import pytest

from pymerge.recipe import Location, ModelReference, Problems
from pymerge.recipe.locate import locate
from pymerge.recipe.reference import parse_reference


def split(text, existing=()):
    found = ModelReference.of(text).split(set(existing).__contains__)
    return [str(part) for part in (found.model, *found.adapters)]


@pytest.mark.parametrize(
    ("text", "existing", "parts"),
    [
        ("org/model", [], ["org/model"]),
        ("org/model@v2", [], ["org/model@v2"]),
        ("org/model+org/lora", [], ["org/model", "org/lora"]),
        ("org/model@v2+lora@main+./other", [], ["org/model@v2", "lora@main", "./other"]),
        ("we+ird@x", ["we+ird@x"], ["we+ird@x"]),
        ("we+ird+lora", ["we+ird"], ["we+ird", "lora"]),
        ("we+ird+lo@ra", ["we+ird", "lo@ra"], ["we+ird", "lo@ra"]),
        ("a+b+c", ["a+b", "a"], ["a+b", "c"]),
    ],
)
def test_marks_are_read_when_no_path_has_them(text, existing, parts):
    assert split(text, existing) == parts


def test_revision_is_kept_apart():
    found = ModelReference.of("org/model@v2+lora").split(lambda _: False)
    assert found == ModelReference(Location("org/model", "v2"), (Location("lora"),))


@pytest.mark.parametrize("text", ["a+", "+a", "a++b", "a@", "@b", "a@b@c"])
def test_marks_without_a_name(text):
    with pytest.raises(ValueError, match="missing|nothing|several"):
        split(text)


@pytest.mark.parametrize(
    "value",
    [
        "org/model@v2+lora",
        {"model": {"path": "we+ird@x"}},
        {"model": {"path": "org/model", "revision": "v2"}, "lora": {"path": "lora"}},
        {"model": {"path": "m"}, "lora": [{"path": "a"}, {"path": "b", "revision": "r"}]},
        {"model": {"path": "m"}, "override_architecture": "LlamaForCausalLM"},
    ],
)
def test_written_as_read(value):
    problems = Problems()
    reference = parse_reference(value, ("model",), problems)
    assert not problems and reference.to_value() == value
    assert parse_reference(reference.to_value(), (), problems) == reference
    assert len(problems.warnings) == 2 * ("override_architecture" in value)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("", "model: is empty; write the path of a checkpoint or a hub id"),
        ({}, "model.model: is empty; write a path, or a mapping"),
        ({"path": "a"}, "model.path: unknown key; a model has model, lora, override_architecture"),
        ({"model": {"path": "a", "rev": "b"}}, "model.model: is a mapping; write a path, or a mapping with 'path' and 'revision'"),
        ({"model": "a", "lora": 3}, "model.lora: is 3; write a path"),
        ({"model": "a", "override_architecture": 3}, "model.override_architecture: is 3; write text"),
    ],
)
def test_mistakes(value, message):
    problems = Problems()
    assert parse_reference(value, ("model",), problems) is None
    assert str(problems.found()[0]).startswith(f"recipe: {message}")


def find(text, folder, **options):
    problems = Problems()
    reference = text if isinstance(text, ModelReference) else ModelReference.of(text)
    return locate(reference, folder, ("model",), problems, **options), [str(p) for p in problems.found()]


def test_paths_and_adapters(tmp_path):
    for name in ("m", "lora", "m@x+y"):
        (tmp_path / name).mkdir()
    located, found = find("m+lora", tmp_path)
    assert (located.path, located.adapters, found) == (tmp_path / "m", (tmp_path / "lora",), [])
    assert find("m@x+y", tmp_path)[0].path == tmp_path / "m@x+y"
    assert find(ModelReference(Location("m"), (Location("lora"),)), tmp_path)[0].adapters == (tmp_path / "lora",)
    assert "only models on the hub have revisions; leave out 'v2'" in find("m@v2", tmp_path)[1][0]
    assert "'lroa' does not exist; did you mean 'lora'?" in find("m+lroa", tmp_path)[1][0]
    assert "nothing after its '@'" in find("n@", tmp_path)[1][0]
    named, _ = find("stage+lora", tmp_path, named={"stage": tmp_path / "m"})
    assert (named.path, named.adapters) == (tmp_path / "m", (tmp_path / "lora",))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A Hugging Face cache with one model at two commits, and no network."""
    pytest.importorskip("huggingface_hub")
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository = tmp_path / "cache/models--org--model"
    for commit, refs in (("1" * 40, ["main"]), ("2" * 40, ["v2"])):
        (repository / "snapshots" / commit).mkdir(parents=True)
        for file in ("config.json", "model.safetensors"):
            (repository / "snapshots" / commit / file).write_text(json.dumps({"commit": commit}))
        (repository / "refs").mkdir(exist_ok=True)
        for ref in refs:
            (repository / "refs" / ref).write_text(commit)
    return repository


def test_hub_ids_from_the_cache(cache, tmp_path):
    assert find("org/model", tmp_path)[0].path == cache / "snapshots" / ("1" * 40)
    assert find("org/model@v2", tmp_path)[0].path == cache / "snapshots" / ("2" * 40)
    assert find("org/model@" + "2" * 40, tmp_path)[0].path == cache / "snapshots" / ("2" * 40)
    (cache / "snapshots" / ("2" * 40) / "model.safetensors").unlink()
    assert "the Hugging Face cache has no weights of it at revision 'v2'" in find("org/model@v2", tmp_path)[1][0]
    missing = find("org/other@v3", tmp_path)[1][0]
    assert "'org/other' is no path here and not in the Hugging Face cache at revision 'v3'; models are fetched only when asked" in missing


def test_download_is_asked_of_the_hub(cache, tmp_path, monkeypatch):
    import huggingface_hub

    asked = []

    def snapshot_download(name, revision=None, local_files_only=False, allow_patterns=None, ignore_patterns=None):
        if local_files_only:
            raise huggingface_hub.errors.LocalEntryNotFoundError("not there")
        asked.append((name, revision, allow_patterns))
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert "--download" in find("org/other", tmp_path)[1][0] and asked == []
    assert find("org/other@v3", tmp_path, download=True)[0].path == cache
    assert [(name, revision) for name, revision, _ in asked] == [("org/other", "v3")] * 2
    assert "*.safetensors" in asked[0][2] and asked[1][2] == ("*.bin",)


def test_download_that_fails(cache, tmp_path):
    assert "'org/other' cannot be downloaded: " in find("org/other", tmp_path, download=True)[1][0]


def test_hub_without_its_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "pip install 'pymerge-kernels[hub]'" in find("org/model", tmp_path)[1][0]
