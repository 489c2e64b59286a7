"""Play the newcomer: `make test-docs`. It takes half an hour, and installs everything twice from the package index.

    python tests/docs/newcomer.py                   everything
    python tests/docs/newcomer.py docs/video.md     the code of these pages alone, in a new environment

1. A fresh clone. `make demo` in it, with only what it installs itself, under four CPU minutes.
2. `make docs`: the strict build, and a search for the words of its task finds each page.
3. A new virtual environment with the wheel, as from PyPI. Every command and snippet of README.md and docs/, in order,
   as it stands, in a folder that holds what the pages speak of. Code that is marked with `needs` is printed as skipped.

Training takes one epoch; the rest is as on the page. The Hub's models are stand-ins of one layer in folders with their
names, so nothing but packages is downloaded.
"""

import contextlib
import json
import math
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from pages import PAGES, ROOT, SERVER, Block, blocks, cleaned, name_of, without_times


DEMO_CPU_SECONDS = 240
ONE_EPOCH = "--num_train_epochs 1 --use_cpu --dataloader_num_workers 0"
# Page of the site: the words of its task. The page must be among the first three that a search finds.
SEARCHES = {
    "quickstart": "install classify first video",
    "real_model": "real model ten minutes UCF101",
    "notebooks": "notebooks jupyter",
    "variants": "choose variant attention_type",
    "weights": "convert weights checkpoint scenic",
    "troubleshooting": "error troubleshooting message",
    "fine_tuning": "fine-tuning your own videos recipe",
    "few_labels": "few labels handful of clips per class",
    "distillation": "distillation teacher student",
    "pretraining": "pretraining without labels",
    "probes": "probe head cross-validation features",
    "video": "damaged video frames sampling limits",
    "lengths": "frame mask clips of different lengths",
    "long_video": "timeline live camera long video",
    "streams": "unchanged threshold still picture",
    "explanations": "explain where the model looked heat map",
    "how_sure": "calibrate temperature none of these",
    "features": "embed search duplicates vectors",
    "speed": "speed memory dtype batch optimize",
    "tuning": "tune fastest setting agreement",
    "export": "export onnx openvino",
    "serving": "serve http server upload",
    "beyond_one_machine": "shards spark ray machines",
    "hub": "push_to_hub space",
    "reference/commands": "vivit-hf classify options help",
    "reference/inference": "StreamingClassifier reference",
    "architecture": "architecture wings imports",
    "SECURITY": "security limits hostile",
}

SESSION = """
import contextlib, io, sys
*before, last = sys.argv[1:]
names = {"__name__": "__main__"}
with contextlib.redirect_stdout(io.StringIO()):
    for name in before:
        exec(compile(open(name, encoding="utf-8").read(), name, "exec"), names)
exec(compile(open(last, encoding="utf-8").read(), last, "exec"), names)
"""


class Newcomer:
    """A clone, an environment for its pages, and what has failed so far."""

    def __init__(self, clone: Path, folder: Path) -> None:
        self.clone, self.folder = clone, folder
        self.failures: list[str] = []
        self.skipped: list[str] = []
        self.environment = {**os.environ, "COLUMNS": "100", "HF_HUB_OFFLINE": "1"}
        for name in ("PYTHONPATH", "VIRTUAL_ENV", "MAKEFLAGS", "MAKELEVEL"):
            self.environment.pop(name, None)

    def shell(self, command: str, cwd: Path, seconds: int = 1800) -> str:
        """Run a command in a shell and return its standard output; a failure is noted, with what it said."""
        print(f"$ {command}", flush=True)
        process = subprocess.Popen(
            ["bash", "-c", command],
            cwd=cwd,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            output, errors = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, errors = process.communicate()
        if process.returncode:
            self.fail(f"{command}: exit code {process.returncode}\n{output[-1500:]}\n{errors[-1500:]}")
        return cleaned(output)

    def fail(self, text: str) -> None:
        print(f"FAILED: {text}", flush=True)
        self.failures.append(text)

    def demo(self) -> None:
        """`make demo` in the clone: what it takes after the installation."""
        self.shell("make .venv/ready-demo", self.clone)
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        output = self.shell("make demo", self.clone)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        print(f"make demo: {seconds:.0f} CPU seconds, {output.strip().splitlines()[-1:]}", flush=True)
        if seconds >= DEMO_CPU_SECONDS:
            self.fail(f"make demo took {seconds:.0f} CPU seconds; the limit is {DEMO_CPU_SECONDS}")

    def site(self) -> None:
        """The strict build, and the search over its index."""
        self.shell("make docs", self.clone)
        with contextlib.suppress(FileNotFoundError):
            index = json.loads((self.clone / "site" / "search" / "search_index.json").read_text(encoding="utf-8"))
            missing = {page.stem for page in PAGES[1:]} - SEARCHES.keys()
            if missing:
                self.fail(f"no words to search for: {', '.join(sorted(missing))}")
            pages = {section["location"].partition("#")[0] for section in index["docs"]}
            for page, words in SEARCHES.items():
                if f"{page}.html" not in pages and not (ROOT / "docs" / f"{page}.md").exists():
                    continue
                found = search(index["docs"], words)[:3]
                if f"{page}.html" not in found:
                    self.fail(f"a search for {words!r} finds {found}, not {page}.html")

    def install(self) -> None:
        """A new environment with the wheel; pip finds it where PyPI would have it."""
        self.shell(f"{sys.executable} -m pip wheel --quiet --no-deps --wheel-dir dist .", self.clone)
        self.shell(f"{sys.executable} -m venv {self.folder}/venv", self.folder)
        self.environment["PATH"] = f"{self.folder}/venv/bin:{os.environ['PATH']}"
        self.environment["PIP_FIND_LINKS"] = f"{os.environ.get('PIP_FIND_LINKS', '')} {self.clone}/dist".strip()
        self.environment["PIP_CONSTRAINT"] = str(self.clone / "constraints.txt")
        index = os.environ.get("TORCH_INDEX")
        self.shell(f"pip install --quiet torch {f'--extra-index-url {index}' if index else ''}", self.folder)
        self.shell("pip install --quiet vivit-hf", self.folder)
        write = "import sys, pathlib; sys.path[:0] = ['tests', 'tests/docs', 'examples']; import page_files; "
        write += f"page_files.write_page_files(pathlib.Path('{self.folder}/template'))"
        self.shell(f'python -c "{write}"', self.clone)

    def page(self, page: Path) -> None:
        """Run the code of a page as it stands, in order."""
        folder = self.folder / "pages" / page.stem
        shutil.copytree(self.folder / "template", folder)
        (folder / "examples").symlink_to(self.clone / "examples")
        printed, address, begun = "", SERVER, time.monotonic()
        with contextlib.ExitStack() as stack:
            for block in blocks(page):
                if block.mark == "needs":
                    print(f"skipped: {block.place} needs {block.words}", flush=True)
                    self.skipped.append(f"{block.place}: {block.words}")
                elif block.mark in ("output", "output of"):
                    if block.mark == "output of":
                        printed = self.command(block.words or "", folder)
                    if without_times(printed) != without_times(block.text):
                        self.fail(f"{block.place} shows another output than\n{printed}")
                elif block.language == "bash":
                    printed = ""
                    for line in block.commands:
                        if line.startswith("vivit-hf serve"):
                            address = stack.enter_context(self.server(line, folder))
                        else:
                            printed += self.command(line.replace(SERVER, address), folder)
                elif block.language == "python":
                    printed = self.snippet(block, block.text.replace(SERVER, address), folder)
        print(f"{name_of(page)}: {time.monotonic() - begun:.0f} s", flush=True)

    def command(self, line: str, folder: Path) -> str:
        """Run a command line of a page; make belongs into the clone, where the demo has run already."""
        if line.startswith("make "):
            self.skipped.append(f"{line}: {'above' if line == 'make demo' else 'in every CI run'}")
            return ""
        make_room(line, folder, self.folder / "template")
        return self.shell(f"{line} {ONE_EPOCH}" if re.search(r" (finetune|pretrain) -?-?\w", line) else line, folder)

    def snippet(self, block: Block, text: str, folder: Path) -> str:
        """Run a Python block after those above it, whose names it may use and whose output is left out."""
        (folder / f"snippet_{block.line}.py").write_text(text, encoding="utf-8")
        scripts = [f"snippet_{one.line}.py" for one in blocks(ROOT / block.page) if one.line <= block.line]
        scripts = [name for name in scripts if (folder / name).exists()]
        (folder / "session.py").write_text(SESSION, encoding="utf-8")
        return self.shell(f"python session.py {' '.join(scripts)}", folder)

    @contextlib.contextmanager
    def server(self, line: str, folder: Path):
        """Start the server of a page on a free port, and yield its address."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        print(f"$ {line} --port {port} &", flush=True)
        log = folder / "server.log"
        with log.open("w") as output:
            process = subprocess.Popen(
                ["bash", "-c", f"exec {line.split(' #')[0]} --port {port}"],
                cwd=folder,
                env=self.environment,
                stdout=output,
                stderr=output,
            )
        try:
            deadline = time.monotonic() + 120
            while "Serving" not in log.read_text() and time.monotonic() < deadline and process.poll() is None:
                time.sleep(0.2)
            if "Serving" not in log.read_text():
                self.fail(f"{line}: the server did not start\n{log.read_text()[-1500:]}")
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(60)


def make_room(line: str, folder: Path, template: Path) -> None:
    """Remove a prepared folder or file that a command is about to write, such as my_vivit."""
    for name in re.findall(r"--output(?:[_-]dir)? (\S+)", line):
        if (template / name).exists() and (folder / name).exists():
            shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()


def search(sections: list[dict[str, Any]], words: str) -> list[str]:
    """Return the pages that a search finds, best first: by rare words, titles, and the boosts of the pages."""
    wanted = {stem(word) for word in re.findall(r"\w+", words.lower())}
    titles = [[stem(word) for word in re.findall(r"\w+", section["title"].lower())] for section in sections]
    texts = [[stem(word) for word in re.findall(r"\w+", section["text"].lower())] for section in sections]
    places = list(zip(sections, titles, texts, strict=True))
    found = {word: sum(word in title or word in text for _, title, text in places) for word in wanted}
    scores: dict[str, float] = {}
    for section, title, text in places:
        score = sum(
            math.log(len(places) / (1 + found[word]))
            * (10 * (word in title) + min(text.count(word), 3) / (1 + len(text) / 200))
            for word in wanted
        )
        page = section["location"].partition("#")[0]
        scores[page] = max(scores.get(page, 0), score * section.get("boost", 1))
    return sorted(scores, key=lambda page: -scores[page])


def stem(word: str) -> str:
    return re.sub(r"(ing|ed|es|s|e)$", "", word) if len(word) > 4 else word


def main() -> None:
    chosen = [page for page in PAGES if name_of(page) in sys.argv]
    if "--in-clone" not in sys.argv:
        with tempfile.TemporaryDirectory() as temporary:
            subprocess.run(["git", "clone", "--quiet", str(ROOT), f"{temporary}/clone"], check=True)
            script = f"{temporary}/clone/{Path(__file__).resolve().relative_to(ROOT).as_posix()}"
            command = [sys.executable, script, *sys.argv[1:], "--in-clone", temporary]
            raise SystemExit(subprocess.run(command).returncode)
    begun = time.monotonic()
    newcomer = Newcomer(ROOT, Path(sys.argv[-1]))
    if not chosen:
        newcomer.demo()
        newcomer.site()
    newcomer.install()
    for page in chosen or PAGES:
        newcomer.page(page)
    print(f"\n{len(chosen or PAGES)} pages in {(time.monotonic() - begun) / 60:.0f} minutes. Not run:")
    print(*newcomer.skipped, sep="\n")
    if newcomer.failures:
        print(f"{len(newcomer.failures)} failures:", *newcomer.failures, sep="\n\n")
        raise SystemExit(1)
    print("No failures.")


if __name__ == "__main__":
    main()
