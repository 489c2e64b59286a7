"""The pages of the documentation, and their blocks of code.

```python                       a snippet, which runs
```bash                         commands, which run if they can in small
<!-- output -->                 the next ```text is what the code block above prints
<!-- output of: COMMAND -->     the next ```text is what this command prints
<!-- needs: WHAT -->            the next block needs a GPU, the Hub, an account ...: it is checked, but never runs
"""

import re
from dataclasses import dataclass
from pathlib import Path


ROOT = Path(__file__).resolve().parent.parent.parent
SERVER = "http://127.0.0.1:8000"  # in the pages; here it has another port
TIMES = re.compile(r"in [\d.]+ s, [\d.]+ per second")
PICTURES = ROOT / "docs" / "pictures"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(
    r"(?:^<!-- (?P<mark>output|output of|needs)(?:: (?P<words>.+?))? -->\n)?"
    r"^ *```(?P<language>python|bash|text|json)\n(?P<text>.*?)^ *```$",
    re.DOTALL | re.MULTILINE,
)


@dataclass(frozen=True)
class Block:
    """A code block of a page: its language, its text, the whole of it with its mark, and the mark with its words."""

    page: str
    line: int
    language: str
    text: str
    source: str
    mark: str | None = None
    words: str | None = None

    @property
    def place(self) -> str:
        return f"{self.page}, line {self.line}"

    @property
    def commands(self) -> list[str]:
        """The command lines of a bash block, without comments; lines that go on with a backslash are one."""
        lines = self.text.replace("\\\n", " ").splitlines()
        return [one for one in (re.sub(r"(^|\s)# .*", "", line).strip() for line in lines) if one]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> list[Block]:
    """Return the blocks of a page in order."""
    text = page.read_text(encoding="utf-8")
    found = []
    for match in BLOCK.finditer(text):
        line = text[: match.start("language")].count("\n") + 1
        found.append(
            Block(name_of(page), line, match["language"], match["text"], match[0], match["mark"], match["words"])
        )
    return found


def cleaned(output: str) -> str:
    return "".join(f"{line.rstrip()}\n" for line in output.strip("\n").splitlines())


def without_times(output: str) -> str:
    """Leave out seconds and rates, which differ from run to run."""
    return TIMES.sub("in ... s", output)
