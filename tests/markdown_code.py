"""Runs the Python code of Markdown pages as printed.

The blocks of a page form one program: each sees the names defined by earlier blocks. A `text` block
directly after a `python` block is its expected output; without one, the block must print nothing.
"""

from __future__ import annotations

import contextlib
import io
import pathlib
import re
from typing import Any, NamedTuple

__all__ = ["Block", "python_blocks", "run_page"]

_BLOCK = re.compile(r"^```python\n(.*?)^```$(?:\n```text\n(.*?)^```$)?", re.DOTALL | re.MULTILINE)


class Block(NamedTuple):
    """A piece of code, the line of the page on which it starts, and its expected output."""

    code: str
    line: int
    printed: str


def python_blocks(page: pathlib.Path) -> list[Block]:
    text = page.read_text()
    return [
        Block(found[1], text.count("\n", 0, found.start(1)), found[2] or "")
        for found in _BLOCK.finditer(text)
    ]


def run_page(page: pathlib.Path) -> dict[str, Any]:
    """Runs all code of a page, compares its output, and returns the names that it defines."""
    names: dict[str, Any] = {"__name__": page.stem}
    blocks = python_blocks(page)
    assert blocks, f"{page} has no code"
    for block in blocks:
        output = io.StringIO()
        # Leading newlines make the line numbers in tracebacks those of the page.
        program = compile("\n" * block.line + block.code, str(page), "exec")
        with contextlib.redirect_stdout(output):
            exec(program, names)
        printed = output.getvalue()
        assert printed == block.printed, f"{page}:{block.line} printed\n{printed}"
    return names
