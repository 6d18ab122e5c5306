"""Python code of Markdown pages, run as printed.

The blocks of a page are one program: each sees the names of those before it. A `text` block that
follows a `python` block at once is what that block prints; a block without one prints nothing.
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
    """A piece of code, the line of the page that it starts at, and what it prints."""

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
    """Runs all code of a page, compares what it prints, and returns the names that it leaves."""
    names: dict[str, Any] = {"__name__": page.stem}
    blocks = python_blocks(page)
    assert blocks, f"{page} has no code"
    for block in blocks:
        output = io.StringIO()
        # Newlines in front, so that tracebacks show lines of the page.
        program = compile("\n" * block.line + block.code, str(page), "exec")
        with contextlib.redirect_stdout(output):
            exec(program, names)
        printed = output.getvalue()
        assert printed == block.printed, f"{page}:{block.line} printed\n{printed}"
    return names
