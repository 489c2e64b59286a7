"""
Runs the commands whose output README.md shows, and puts what they print today in its place, pictures included.

    python examples/update_readme.py            rewrites README.md and examples/pictures
    python examples/update_readme.py --check    changes nothing; exits with 1 and a diff where the README is not true

A block is a line `<!-- output of: COMMAND -->` and the fenced text below it. Commands run one after the other in a
folder of their own, where `vivit-hf demo` has left its videos. Seconds and rates differ from run to run: they do not
count in a check.
"""

import argparse
import difflib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image, ImageChops, ImageStat


ROOT = Path(__file__).resolve().parent.parent
BLOCK = re.compile(r"(<!-- output of: (?P<command>.+?) -->\n```text\n)(?P<output>.*?)(```\n)", re.DOTALL)
TIMES = re.compile(r"in [\d.]+ s, [\d.]+ per second")


def run(command: str, folder: Path) -> str:
    """What a command prints on standard output; `vivit-hf` is that of this Python."""
    words = shlex.split(command)
    if words[0] == "vivit-hf":
        words = [sys.executable, "-m", "vivit_hf", *words[1:]]
    environment = {**os.environ, "COLUMNS": "100", "HF_HUB_OFFLINE": "1"}
    process = subprocess.run(words, cwd=folder, capture_output=True, text=True, env=environment)
    if process.returncode:
        raise SystemExit(f"{command}: exit code {process.returncode}\n{process.stderr}")
    return "\n".join(line.rstrip() for line in process.stdout.rstrip().splitlines()) + "\n"


def updated(text: str, folder: Path) -> str:
    """The README with what its commands print today."""
    return BLOCK.sub(lambda match: match[1] + run(match["command"], folder) + match[4], text)


def looks_like(path: Path, other: Path) -> bool:
    """Whether two pictures are the same but for the roundings of another machine, and the first one is there."""
    if not path.exists():
        return False
    with Image.open(path) as first, Image.open(other) as second:
        if first.size != second.size:
            return False
        difference = ImageChops.difference(first.convert("RGB"), second.convert("RGB"))
        return sum(ImageStat.Stat(difference).mean) / 3 < 2  # of 255


def main() -> None:
    parser = argparse.ArgumentParser(description="Put real output into README.md.")
    parser.add_argument("--check", action="store_true", help="change nothing; fail where the README is not true")
    arguments = parser.parse_args()
    readme = ROOT / "README.md"
    before = readme.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        run("vivit-hf demo --output vivit_demo", folder)
        after = updated(before, folder)
        pictures = [*folder.glob("*.png"), *folder.glob("*.gif")]
        if arguments.check:
            lines = [TIMES.sub("in ... s", text).splitlines(keepends=True) for text in (before, after)]
            difference = "".join(difflib.unified_diff(*lines, "README.md", "README.md as its commands print it"))
            stale = [one.name for one in pictures if not looks_like(ROOT / "examples" / "pictures" / one.name, one)]
            if difference or stale:
                raise SystemExit(difference + "".join(f"examples/pictures/{name} is another one\n" for name in stale))
            return
        for picture in pictures:
            shutil.copyfile(picture, ROOT / "examples" / "pictures" / picture.name)
    readme.write_text(after, encoding="utf-8")
    print(f"{len(BLOCK.findall(after))} outputs and {len(pictures)} pictures")


if __name__ == "__main__":
    main()
