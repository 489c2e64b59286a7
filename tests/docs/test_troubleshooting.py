"""The messages that the page on troubleshooting quotes are those of the code."""

import ast
import re

import pytest
from paths import ROOT

import vivit_hf


PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
HEADINGS = re.findall(r"^### (.*)$", PAGE, flags=re.MULTILINE)
QUOTED = [heading.strip("`") for heading in HEADINGS if heading.startswith("`")]
QUOTED += re.findall(r"says `(.*?)`", PAGE)


def text_of(node):
    """The text of a string; what an f-string computes is an ellipsis."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else ""
    return "".join(text_of(part) if isinstance(part, ast.Constant) else "…" for part in node.values)


@pytest.fixture(scope="module")
def messages():
    sources = (ROOT / "src" / vivit_hf.__name__).rglob("*.py")
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in sources]
    nodes = (node for tree in trees for node in ast.walk(tree) if isinstance(node, (ast.Constant, ast.JoinedStr)))
    return "\n".join(text_of(node) for node in nodes)


@pytest.mark.parametrize("quoted", QUOTED)
def test_quoted_message_is_in_the_code(quoted, messages):
    pattern = "[^\n]*?".join(re.escape(part) for part in quoted.split("…"))
    assert re.search(pattern, messages)


def test_the_page_has_the_messages_that_people_meet_most():
    assert len(HEADINGS) >= 20 and len(set(HEADINGS)) == len(HEADINGS)
