"""Links, anchors, commands and numbers of all pages, without running their code."""

import ast
import importlib
import re
import shlex
from functools import cache

import pytest
from command_line import invoke
from page_runner import SMALL
from pages import PAGES, ROOT, Block, blocks, name_of
from paper_table import PAPER, count
from typer.main import get_command

from vivit_hf.cli.app import app


BLOCKS = [block for page in PAGES for block in blocks(page)]
TEXTS = [*PAGES, *sorted((ROOT / "docs" / "reference").glob("*.md")), *sorted((ROOT / "benchmarks").glob("*.md"))]
TEXTS += [ROOT / name for name in ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")]
LINKS = sorted(
    {
        (name_of(page), target)
        for page in TEXTS
        for target in re.findall(r"\]\((?![a-z]+:)([^)\s]+)\)", page.read_text(encoding="utf-8"))
    }
)
PROGRAM = get_command(app)
OTHER_PROGRAMS = {"pip", "make", "curl", "ffmpeg", "docker", "torchrun", "accelerate", "python", "cd", "git"}
OTHER_PROGRAMS |= {"hf", "tar", "cat"}
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)


@cache
def anchors(path):
    """The anchors of the headings of a page, as Git hosts and the site make them."""
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in HEADING.findall(text)}


@pytest.mark.parametrize(("page", "target"), LINKS)
def test_links_lead_to_a_file_and_an_anchor(page, target):
    path, _, anchor = target.partition("#")
    file = (ROOT / page).parent / path if path else ROOT / page
    assert file.exists()
    assert not anchor or anchor in anchors(file), sorted(anchors(file))


def test_every_page_is_on_the_home_page_or_in_the_navigation():
    navigation = (ROOT / "properdocs.yml").read_text(encoding="utf-8")
    assert not [page.name for page in PAGES[1:] if page.name not in navigation]


@cache
def help_of(*path):
    result = invoke(*path, "--help")
    assert result.exit_code == 0, f"there is no command {' '.join(path)}"
    return result.stdout.replace("-", "_")


def check_package_command(words):
    """A command of the package is known, and so are its options."""
    path = words[:2] if words[0] == "convert" else words[:1]
    text = help_of(*path)
    for word in words[len(path) :]:
        option = word.partition("=")[0]
        if option.startswith("--") and option not in ("--help",):
            assert re.search(rf"{option.replace('-', '_')}\b", text), f"{' '.join(path)} has no {option}"


def package_words(line):
    """The words behind the name of our command line in a command, however it is started; None if it is another one."""
    words = shlex.split(line)
    if words[:2] == ["docker", "run"]:  # the image runs the server
        return ["serve", *words[words.index("vivit-hf") + 1 :]]
    if words[0] != "docker" and "vivit-hf" in words:
        return words[words.index("vivit-hf") + 1 :]
    if "vivit_hf" in words and words[words.index("vivit_hf") - 1] == "-m":
        return words[words.index("vivit_hf") + 1 :]
    return None


COMMANDS = [
    pytest.param(line, id=f"{block.place}: {line[:40]}")
    for block in BLOCKS
    for line in (block.commands if block.language == "bash" else [block.words] if block.mark == "output of" else [])
]


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_are_known_with_their_options(line):
    words = shlex.split(line.replace("$(", "").replace("|", " "))
    if ours := package_words(line.replace("|", " ")):
        check_package_command(ours)
    elif words[0] == "make":
        assert f"\n{words[1]}:" in (ROOT / "Makefile").read_text()
    elif words[0] == "pip":
        extras = re.findall(r"\[(\w+)\]", line)
        assert all(f"\n{extra} = [" in (ROOT / "pyproject.toml").read_text() for extra in extras)
    elif words[0] == "python":
        source = (ROOT / words[1]).read_text()
        assert all(word.strip("-") in source.replace("_", "-") for word in words[2:] if word.startswith("--"))
    else:
        assert words[0] in OTHER_PROGRAMS


def test_inline_commands_are_known():
    for page in PAGES:
        for name in re.findall(r"`vivit-hf ([a-z][a-z-]*)", page.read_text(encoding="utf-8")):
            assert name in PROGRAM.commands, f"{name_of(page)}: vivit-hf {name}"
    assert set(SMALL) <= set(PROGRAM.commands)


@pytest.mark.parametrize("block", [one for one in BLOCKS if one.mark == "needs"], ids=lambda block: block.place)
def test_code_that_does_not_run_here_is_marked_with_a_reason_and_imports_what_exists(block: Block):
    assert block.words
    if block.language != "python":
        return
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("vivit_hf"):
            assert all(hasattr(importlib.import_module(node.module), alias.name) for alias in node.names)


def test_few_blocks_are_left_out():
    """A page that marks its code as unable to run proves nothing."""
    # tests/hub/test_real_model_page.py runs that page against a Hub on this machine.
    here = [block for block in BLOCKS if block.page != "docs/real_model.md"]
    code = [block for block in here if block.language in ("python", "bash")]
    left_out = [block for block in code if block.mark == "needs"]
    assert len(code) >= 40 and len(left_out) <= len(code) / 3
    assert not [block.place for block in left_out if block.page == "README.md"]


def test_every_output_stands_below_its_code():
    for page in PAGES:
        before = None
        for block in blocks(page):
            if block.mark == "output":
                assert before in ("python", "bash"), f"{block.place}: there is no code above this output"
            before = block.language
    assert sum(block.mark in ("output", "output of") for block in BLOCKS) >= 15


def test_the_readme_fits_on_its_page():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_numbers_of_the_variants_table_are_the_counted_ones():
    """The first number of each cell is ours, the one in brackets the paper's."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `factorised.*$|^\| `spatio.*$", text, flags=re.MULTILINE)
    assert len(rows) == len(PAPER) == 5
    for row, (preset, parameters, multiply_adds) in zip(rows, PAPER, strict=True):
        cells = [cell.strip() for cell in row.split("|")]
        counted = count(preset)
        assert cells[3] == f"{counted[0]:.2f} ({parameters})"
        assert cells[4] == f"{counted[1]:.1f} ({multiply_adds})"


def test_scripts_that_pages_name_exist():
    pattern = r"`python ((?:examples|benchmarks|conversion)/[\w/]+\.py)"
    named = {name for page in PAGES for name in re.findall(pattern, page.read_text(encoding="utf-8"))}
    assert named and all((ROOT / name).is_file() for name in named)
