"""
Indent what belongs to list items by four columns, as Python-Markdown expects; Git hosts take the two that pages have.

Also put an empty line above lists that follow a paragraph directly, and above items that follow an indented paragraph.
"""

import re
from typing import Any


ITEM = re.compile(r"(-|\d+\.) ")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Rewrite the lists of a page."""
    lines: list[str] = []
    in_list = in_code = has_paragraphs = False
    for line in markdown.split("\n"):
        previous = lines[-1] if lines else ""
        if line.startswith("```"):
            in_code, in_list = not in_code, False
        elif in_code:
            pass
        elif ITEM.match(line):
            if previous and (has_paragraphs or not in_list):
                lines.append("")
            in_list, has_paragraphs = True, has_paragraphs and in_list
        elif in_list and line.startswith("  "):
            has_paragraphs |= not previous
            line = f"  {line}"
        elif line:
            in_list = has_paragraphs = False
        lines.append(line)
    return "\n".join(lines)
