"""The pages of the merge methods: complete, and the ones in docs/ are the registry's."""

from pathlib import Path

import pytest

from bmm.anchors import ANCHORS
from bmm.report import method_page, methods_index, write_pages

DOCS = Path(__file__).parents[2] / "docs" / "methods"


@pytest.mark.parametrize("anchor", ANCHORS.values(), ids=ANCHORS)
def test_a_page_says_what_the_row_says(anchor):
    page = method_page(anchor)
    assert page.startswith(f"# {anchor.title} (`{anchor.name}`)")
    for text in (anchor.summary, anchor.formula, anchor.cost, anchor.when, anchor.paper.split(",")[0]):
        assert text in page
    for knob in anchor.knobs:
        assert f"| `{knob.name}`" in page
        assert knob.help in page
    assert f"bmm tune --anchor {anchor.name}" in page


def test_the_pages_in_docs_are_those_of_the_registry(tmp_path):
    """After a change of a row: `bmm anchors --write docs/methods`."""
    written = {p.name: p.read_text() for p in write_pages(tmp_path)}
    assert {p.name: p.read_text() for p in DOCS.glob("*.md")} == written


def test_the_index_links_every_page():
    index = methods_index(ANCHORS.values())
    for name in ANCHORS:
        assert f"[`{name}`]({name}.md)" in index
