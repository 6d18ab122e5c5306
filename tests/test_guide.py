"""The guide: its code runs as printed and prints what it shows. Links of all pages lead somewhere.

The pages compare their results with dense attention themselves.
"""

from __future__ import annotations

import pathlib
import re

import pytest
from markdown_code import python_blocks, run_page
from subprocesses import run_python

_ROOT = pathlib.Path(__file__).parents[1]
_GUIDE = _ROOT / "examples" / "guide"
_INDEX = _GUIDE / "README.md"
_PAGES = sorted(page for page in _GUIDE.glob("*.md") if page != _INDEX)
_OTHERS = ("README.md", "CHANGELOG.md", "benchmarks/README.md", "examples/README.md")
_LINKED = [_INDEX, *_PAGES, _GUIDE.parent / "reference.md", *(_ROOT / name for name in _OTHERS)]


def _runs_alone(page: pathlib.Path) -> bool:
    """Returns whether a page sets variables that JAX reads when it starts."""
    return any("os.environ[" in block.code for block in python_blocks(page))


@pytest.mark.parametrize(
    "page", [page for page in _PAGES if not _runs_alone(page)], ids=lambda p: p.stem
)
def test_a_page_runs_as_printed(page: pathlib.Path) -> None:
    run_page(page)


@pytest.mark.exhaustive  # on several devices, whose programs take long to compile
@pytest.mark.parametrize(
    "page", [page for page in _PAGES if _runs_alone(page)], ids=lambda p: p.stem
)
def test_a_page_that_needs_a_process_runs_as_printed(page: pathlib.Path) -> None:
    run_python(
        """
        import pathlib, sys
        import markdown_code
        markdown_code.run_page(pathlib.Path(sys.argv[1]))
        """,
        str(page),
    )


@pytest.mark.parametrize("page", _PAGES, ids=lambda p: p.stem)
def test_a_page_checks_its_results_and_uses_public_names(page: pathlib.Path) -> None:
    code = "".join(block.code for block in python_blocks(page))
    assert "assert" in code
    assert "jax.nn.dot_product_attention" in code
    assert not re.search(r"kvp\._|jax_kvpage\.|jax\._src|\bpool\._", code)


def _anchors(page: pathlib.Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in headings}


@pytest.mark.parametrize("page", _LINKED, ids=lambda p: str(p.relative_to(_ROOT)))
def test_links_lead_to_files_and_headings(page: pathlib.Path) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        file, _, anchor = link.partition("#")
        target = (page.parent / file) if file else page
        assert target.exists(), link
        assert not anchor or anchor in _anchors(target), link


def test_the_index_names_every_page() -> None:
    links = set(re.findall(r"\]\((\w+\.md)\)", _INDEX.read_text()))
    assert links == {page.name for page in _PAGES}
