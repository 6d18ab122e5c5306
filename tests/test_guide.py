"""The guide: its code runs as printed and prints what it shows, and its links lead somewhere.

The pages compare their results with dense attention themselves.
"""

from __future__ import annotations

import pathlib
import re

import pytest
from markdown_code import python_blocks, run_page
from subprocesses import run_python

_GUIDE = pathlib.Path(__file__).parents[1] / "examples" / "guide"
_INDEX = _GUIDE / "README.md"
_PAGES = sorted(page for page in _GUIDE.glob("*.md") if page != _INDEX)


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


@pytest.mark.parametrize("page", [_INDEX, *_PAGES], ids=lambda p: p.stem)
def test_links_lead_to_files_and_headings(page: pathlib.Path) -> None:
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in headings}
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        if link.startswith("#"):
            assert link[1:] in anchors, link
        else:
            assert (page.parent / link).exists(), link


def test_the_index_names_every_page() -> None:
    links = set(re.findall(r"\]\((\w+\.md)\)", _INDEX.read_text()))
    assert links == {page.name for page in _PAGES}
