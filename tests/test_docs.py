"""Every example in the documentation runs: Python blocks page by page, recipes checked, commands known."""

import contextlib
import io
import re
import shlex
from pathlib import Path

import pytest
import typer.main

from compress.cli import app
from compress.recipe import load_recipe

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(\w+)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    return [text for found, text in FENCE.findall(page.read_text(encoding="utf-8")) if found == language]


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=name)
def test_the_python_examples_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__main__"}
    for number, source in enumerate(blocks(page, "python"), start=1):
        code = compile(source, f"{name(page)}, block {number}", "exec")
        with contextlib.redirect_stdout(io.StringIO()):
            exec(code, namespace)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "yaml")], ids=name)
def test_the_recipes_are_valid(page, tmp_path):
    whole = [text for text in blocks(page, "yaml") if "summary:" in text]
    for number, text in enumerate(whole):
        file = tmp_path / f"{number}.yaml"
        file.write_text(text)
        load_recipe(file)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "console")], ids=name)
def test_the_commands_take_the_options_that_the_pages_show(page):
    commands = typer.main.get_command(app).commands
    for text in blocks(page, "console"):
        for line in text.replace("\\\n", " ").splitlines():
            words = shlex.split(line.removeprefix("$ "), comments=True)
            if words[:1] != ["modelpress"] or words[1].startswith("-"):
                continue
            known = {option for parameter in commands[words[1]].params for option in parameter.opts}
            unknown = [
                word for word in words[2:] if word.startswith("--") and word.split("=")[0] not in known
            ]
            assert not unknown, f"{line}: {unknown} of {sorted(known)}"
