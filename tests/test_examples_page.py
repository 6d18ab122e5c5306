"""The page on the examples names only programs, options and files that exist."""

import os
import pathlib
import re
import subprocess
import sys

import pytest

_EXAMPLES = pathlib.Path(__file__).parents[1] / "examples"
_PAGE = (_EXAMPLES / "README.md").read_text()
_SECTIONS = re.findall(r"^## (\w+\.py)[^\n]*\n(.*?)(?=^## |\Z)", _PAGE, re.MULTILINE | re.DOTALL)


def test_each_program_has_a_section() -> None:
    programs = {path.name for path in _EXAMPLES.glob("*.py")} - {"train_tiny_llama.py"}
    assert {program for program, _ in _SECTIONS} == programs


@pytest.mark.parametrize(("program", "section"), _SECTIONS, ids=[name for name, _ in _SECTIONS])
def test_options_exist(program: str, section: str) -> None:
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", section))
    assert named
    command = [sys.executable, str(_EXAMPLES / program), "--help"]
    env = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    assert named <= set(re.findall(r"--[a-z][a-z-]+", done.stdout))


def test_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)]+)\)", _PAGE)
    assert links
    for link in links:
        assert (_EXAMPLES / link).exists(), link
