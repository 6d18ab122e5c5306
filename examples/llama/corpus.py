"""English text from any Python installation: the language reference, and docstrings and comments of
the standard library.

The bundled model is trained on it, so that nothing has to be downloaded or licensed separately (all
of it is under Python's PSF licence). The corpus depends only on the Python version: files are read
in sorted order, from the standard library only, never from site-packages.
"""

import ast
import hashlib
import itertools
import pathlib
import re
import sysconfig
import textwrap
from collections.abc import Iterator
from pydoc_data import topics

__all__ = ["build", "is_held_out"]

# Parts of the library that are tests, third-party or generated code, or missing from the packages
# of some distributions.
_SKIP = {
    *("test", "tests", "idle_test", "idlelib", "lib2to3", "turtledemo", "ensurepip", "encodings"),
    *("site-packages", "dist-packages", "lib-dynload", "__pycache__", "pydoc_data", "distutils"),
}
_RULE = re.compile(r"^\s*([=*~^\-#.\"'])\1{2,}\s*$")
_PROSE_SHARE = 0.86  # letters and spaces in a paragraph; tables, grammars and code have fewer


def build() -> list[str]:
    """Returns the documents, in a fixed order, without repeated paragraphs."""
    seen: set[str] = set()
    documents = []
    for raw in itertools.chain(_topics(), _library()):
        paragraphs = [text for text in _paragraphs(raw) if text not in seen]
        seen.update(paragraphs)
        if any(text.endswith((".", ":")) for text in paragraphs):
            documents.append("\n\n".join(paragraphs))
    return documents


def is_held_out(document: str) -> bool:
    """Whether a document is excluded from training: one in twenty, by a hash of its text."""
    return hashlib.sha256(document.encode()).digest()[0] % 20 == 0


def _topics() -> Iterator[str]:
    for name in sorted(topics.topics):
        yield topics.topics[name]


def _library() -> Iterator[str]:
    """Yields docstrings (a document for each module, class and function) and comments (one for each
    module).
    """
    root = pathlib.Path(sysconfig.get_path("stdlib"))
    for file in sorted(root.rglob("*.py")):
        parts = file.relative_to(root).with_suffix("").parts
        if _SKIP.intersection(parts) or parts[0].startswith(("config-", "_sysconfigdata")):
            continue
        try:
            source = file.read_text(encoding="utf-8")
            tree = ast.parse(source)
        except (SyntaxError, UnicodeDecodeError):  # a few files are invalid on purpose
            continue
        module = ".".join(part for part in parts if part != "__init__")
        yield from _docstrings(tree, module)
        yield _comments(source)


def _docstrings(node: ast.AST, name: str) -> Iterator[str]:
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    if isinstance(node, kinds) and (text := ast.get_docstring(node)):
        yield f"{name}\n====\n\n{text}"
    for child in ast.iter_child_nodes(node):
        if isinstance(child, kinds[1:]):
            yield from _docstrings(child, f"{name}.{child.name}")


def _comments(source: str) -> str:
    lines = (line.strip() for line in source.splitlines())
    bare = (re.sub(r"^#+:? ?", "", line) if line.startswith("#") else "" for line in lines)
    return "\n".join(bare)


def _paragraphs(raw: str) -> Iterator[str]:
    """Yields headings and paragraphs of prose, each on one line, without markup."""
    for block in re.split(r"\n\s*\n", textwrap.dedent(raw.replace("\r", ""))):
        lines = block.splitlines()
        kept = [line.strip() for line in lines if line.strip() and not _RULE.match(line)]
        if not kept:
            continue
        heading = len(kept) == 1 and len(lines) > 1
        text = re.sub(r"\s+", " ", " ".join(kept))
        text = re.sub(r"(?:`{1,2}|\*{1,2})(\w[^`*']*)(?:`{1,2}|\*{1,2}|')", r"\1", text)
        if heading or _is_prose(text):
            yield text


def _is_prose(text: str) -> bool:
    if not text.isascii() or text.startswith((">>>", "$", "|", "+")) or ">>>" in text:
        return False
    letters = sum(character.isalpha() or character == " " for character in text)
    return len(text.split()) >= 5 and letters >= _PROSE_SHARE * len(text)
