"""Run the commands whose output README.md shows, and replace the outputs and pictures in it.

    python examples/update_readme.py            rewrites README.md and examples/pictures
    python examples/update_readme.py --check    prints a diff and exits with 1 if README.md is outdated

A block is a line `<!-- output of: COMMAND -->` and the fenced text below it. All commands run in one temporary folder,
after `vivit-hf demo` has written its videos there. The check ignores seconds and rates, which differ from run to run.
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
    """Return the standard output of a command; `vivit-hf` runs in this Python."""
    words = shlex.split(command)
    if words[0] == "vivit-hf":
        words = [sys.executable, "-m", "vivit_hf", *words[1:]]
    environment = {**os.environ, "COLUMNS": "100", "HF_HUB_OFFLINE": "1"}
    process = subprocess.run(words, cwd=folder, capture_output=True, text=True, env=environment)
    if process.returncode:
        raise SystemExit(f"{command}: exit code {process.returncode}\n{process.stderr}")
    return "\n".join(line.rstrip() for line in process.stdout.rstrip().splitlines()) + "\n"


def looks_like(path: Path, other: Path) -> bool:
    """Return whether a picture exists and equals another one, except for rounding on another machine."""
    if not path.exists():
        return False
    with Image.open(path) as first, Image.open(other) as second:
        if first.size != second.size:
            return False
        difference = ImageChops.difference(first.convert("RGB"), second.convert("RGB"))
        return sum(ImageStat.Stat(difference).mean) / 3 < 2  # of 255


def main() -> None:
    parser = argparse.ArgumentParser(description="Put real output into README.md.")
    parser.add_argument("--check", action="store_true", help="change nothing; fail if the README is outdated")
    arguments = parser.parse_args()
    readme = ROOT / "README.md"
    before = readme.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        run("vivit-hf demo --output vivit_demo", folder)
        after = BLOCK.sub(lambda match: match[1] + run(match["command"], folder) + match[4], before)
        pictures = [*folder.glob("*.png"), *folder.glob("*.gif")]
        if arguments.check:
            lines = [TIMES.sub("in ... s", text).splitlines(keepends=True) for text in (before, after)]
            difference = "".join(difflib.unified_diff(*lines, "README.md", "README.md as its commands print it"))
            stale = [one.name for one in pictures if not looks_like(ROOT / "examples" / "pictures" / one.name, one)]
            if difference or stale:
                raise SystemExit(difference + "".join(f"examples/pictures/{name} has changed\n" for name in stale))
            return
        for picture in pictures:
            shutil.copyfile(picture, ROOT / "examples" / "pictures" / picture.name)
    readme.write_text(after, encoding="utf-8")
    print(f"{len(BLOCK.findall(after))} outputs and {len(pictures)} pictures")


if __name__ == "__main__":
    main()
