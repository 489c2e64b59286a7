"""Run the code of a page in a folder that holds what the pages speak of, in the process of the tests."""

import contextlib
import io
import itertools
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from command_line import invoke
from pages import PICTURES, ROOT, SERVER, Block, blocks, cleaned
from PIL import Image, ImageChops, ImageStat
from running_server import RunningServer


# What makes a command small: training by steps in place of epochs, and few views.
SMALL = {
    "finetune": "--max_steps 1 --use_cpu --num_frames 4 --num_clips 1 --num_crops 1 --dataloader_num_workers 0",
    "pretrain": "--max_steps 1 --use_cpu --num_frames 4 --dataloader_num_workers 0",
    "export": "--num-clips-checked 4",
    "evaluate": "--use_cpu --num_workers 0",
    "classify-dataset": "--use_cpu --num_workers 0",
    "embed": "--workers 0",
    "tune": "--max-clips 2 --merge-tokens 1 --workers 0",
}
OUTPUTS = {"--output", "--output_dir", "--output-dir"}


class PageRunner:
    """A folder of its own for a page: each block sees what those before it have left there."""

    def __init__(self, template: Path, folder: Path) -> None:
        self.folder = Path(shutil.copytree(template, folder))
        self._prepared = {path.name for path in self.folder.iterdir()}
        self._names: dict[str, Any] = {"__name__": "__main__"}  # what a snippet defines, those below it may use
        self._server: RunningServer | None = None

    def run(self, page: Path) -> Iterator[tuple[Block, str]]:
        """Run the page, and yield each block that shows an output with the output of today."""
        printed = ""
        with contextlib.ExitStack() as stack:
            stack.callback(os.chdir, os.getcwd())
            os.chdir(self.folder)
            for block in blocks(page):
                if block.mark == "output of":
                    printed = self.command(block.words, stack)
                if block.mark in ("output", "output of"):
                    yield block, printed
                elif block.mark != "needs" and block.language == "python":
                    printed = self.snippet(block)
                elif block.mark != "needs" and block.language == "bash":
                    printed = "".join(self.command(line, stack) for line in block.commands)

    def snippet(self, block: Block) -> str:
        """Run a Python block and return what it printed."""
        text = block.text if self._server is None else block.text.replace(SERVER, self._server.address)
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            exec(compile("\n" * block.line + text, block.page, "exec"), self._names)
        return cleaned(output.getvalue())

    def command(self, line: str, stack: contextlib.ExitStack) -> str:
        """Run a command of the package, a script of the repository, or a request to the server; no other commands."""
        words = shlex.split(line)
        if words[0] == "curl" and self._server is not None:
            words = [word.replace(SERVER, self._server.address) for word in words]
            return cleaned(
                subprocess.run([*words, "-s"], capture_output=True, text=True, timeout=60, check=True).stdout
            )
        if words[:2] == ["vivit-hf", "serve"]:
            self._server = stack.enter_context(RunningServer(*words[2:]))
            return ""
        if words[0] == "vivit-hf":
            return self._package_command(line, words[1:])
        if words[0] == "python" and words[1].startswith("examples/"):
            return self._script(words[1], words[2:])
        return ""

    def _package_command(self, line: str, words: list[str]) -> str:
        is_shown = "--help" in words
        words += [] if is_shown else shlex.split(SMALL.get(words[0], ""))
        self._make_room(words)
        result = invoke(*words)
        assert result.exit_code == 0, f"{line}: exit code {result.exit_code}\n{result.output}\n{result.exception!r}"
        return cleaned(result.stdout)

    def _script(self, script: str, words: list[str]) -> str:
        arguments, output = sys.argv, io.StringIO()
        sys.argv = [script, *words]
        try:
            with contextlib.redirect_stdout(output):
                runpy.run_path(str(ROOT / script), run_name="__main__")
        except SystemExit as ending:
            if ending.code:
                raise AssertionError(f"{script}: {ending.code}") from ending
        finally:
            sys.argv = arguments
        return cleaned(output.getvalue())

    def _make_room(self, words: list[str]) -> None:
        """Remove a prepared file or folder that a command is about to write, such as my_vivit."""
        for option, value in itertools.pairwise(words):
            if option in OUTPUTS and value in self._prepared:
                self._prepared.remove(value)
                shutil.rmtree(value) if Path(value).is_dir() else Path(value).unlink()


def new_pictures(page: Path, folder: Path) -> list[Path]:
    """Return the pictures of a page that its commands have drawn in a folder, and that look different now."""
    names = re.findall(r"\bpictures/([\w.-]+)\)", page.read_text(encoding="utf-8"))
    drawn = [folder / name for name in names if (folder / name).exists()]
    return [picture for picture in drawn if not looks_like(PICTURES / picture.name, picture)]


def looks_like(path: Path, other: Path) -> bool:
    """Return whether a picture exists and equals another one, except for rounding on another machine."""
    if not path.exists():
        return False
    with Image.open(path) as first, Image.open(other) as second:
        if first.size != second.size:
            return False
        difference = ImageChops.difference(first.convert("RGB"), second.convert("RGB"))
        return sum(ImageStat.Stat(difference).mean) / 3 < 2  # of 255
