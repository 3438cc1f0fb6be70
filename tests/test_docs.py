"""The documentation is true: its Python runs, its recipes are understood, its links lead somewhere, its table is the code's."""

from __future__ import annotations

import dataclasses
import importlib
import re
from pathlib import Path

import pytest
import yaml

from pymerge import Convention
from pymerge.conventions import _PRESETS
from pymerge.merge_methods import registry
from pymerge.recipe import load_recipe

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=lambda p: p.stem)
def test_python_examples_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for i, source in enumerate(blocks(page, "python")):  # a page's examples share their names, as a reader's session would
        exec(compile(source, f"{page.name}, example {i + 1}", "exec"), names)


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "yaml")], ids=lambda p: p.stem)
def test_recipes_name_what_exists(page):
    for source in blocks(page, "yaml"):
        recipe = load_recipe(yaml.safe_load(source))
        known = {p.recipe: p for p in registry.get_method(recipe.merge_method).parameters}
        assert set(recipe.parameters) <= set(known)
        for model in recipe.models:
            assert all(known[name].per_model for name in model.parameters)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
        assert target.startswith("http") or (page.parent / target).exists(), f"{page.name} links to {target}"


def test_every_method_is_documented():
    text = "\n".join(page.read_text() for page in PAGES)
    # Other tests may have registered methods of their own.
    names = [name for name in registry.methods() if registry.get_method(name).tensor.__module__.startswith("pymerge.")]
    assert names and not [name for name in names if f"`{name}`" not in text and f"merge_method: {name}\n" not in text]


def test_preset_table_is_the_code():
    table = (ROOT / "docs/conventions.md").read_text().split("<!-- presets: begin -->")[1].split("<!-- presets: end -->")[0]
    heading, _, *lines = ([cell.strip() for cell in line.strip("|").split("|")] for line in table.strip().splitlines())
    fields = [field.name for field in dataclasses.fields(Convention)]
    expected = [
        [preset, method, *(str(getattr(convention, field)).lower() for field in fields)]
        for preset, methods in _PRESETS.items()
        for method, convention in methods.items()
    ]
    assert heading == ["preset", "method", *fields]
    assert lines == expected


def test_choices_table_is_the_code():
    from pymerge.conventions import _CHOICES

    table = (ROOT / "docs/conventions.md").read_text().split("## The choices")[1].split("## The presets")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.strip().splitlines()[2:]]
    assert [(row[0], row[1]) for row in rows] == [(name, ", ".join(str(v).lower() for v in values)) for name, values in _CHOICES.items()]


def test_command_line_page_has_every_option():
    from pymerge.cli import main as cli

    group, text = importlib.import_module(f"{cli.__module__}")._group, (ROOT / "docs/cli.md").read_text()
    for name in group.list_commands(None):
        assert f"## pymerge {name}" in text
        for parameter in group.get_command(None, name).params:
            assert all(f"`{option}" in text for option in parameter.opts if option.startswith("-"))


@pytest.mark.parametrize("page", sorted((ROOT / "examples/results").glob("E*.md")), ids=lambda p: p.stem)
def test_experiments_page_shows_the_committed_results(page):
    result = page.read_text()
    assert "5 seeds" in result
    assert result.split("\n\n", 2)[2].strip() in (ROOT / "docs/experiments.md").read_text()
