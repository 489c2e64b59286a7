"""The README's snippets run as they stand, in a folder that holds what the README says is there."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_line import invoke
from moving_shapes import MOTIONS, write_moving_shapes
from paper_table import PAPER, count
from paths import ROOT
from tiny_models import make_model
from transformers import (
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    ViTConfig,
    ViTModel,
    VivitConfig,
    VivitForVideoClassification,
)

from vivit_hf import ViViTConfig, ViViTVideoProcessor


pytestmark = pytest.mark.slow


README = ROOT / "README.md"
SNIPPETS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What `make demo` leaves behind, untrained; and small checkpoints in the layouts of those on the Hub."""
    path = tmp_path_factory.mktemp("readme")
    write_moving_shapes(path / "demo_output" / "videos", clips_per_class=1, seed=0)
    labels = dict(enumerate(MOTIONS))
    make_model(ViViTConfig.from_preset("vivit-tiny", id2label=labels)).save_pretrained(path / "demo_output" / "model")
    ViViTVideoProcessor(
        num_frames=16, frame_stride=1, size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}
    ).save_pretrained(path / "demo_output" / "model")
    torch.manual_seed(0)
    native = VivitConfig(hidden_size=48, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48)
    VivitForVideoClassification(native).save_pretrained(path / "google" / "vivit-b-16x2-kinetics400")
    image = ViTConfig(hidden_size=48, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48)
    ViTModel(image).save_pretrained(path / "google" / "vit-base-patch16-224-in21k")
    registers = Dinov2WithRegistersConfig(hidden_size=48, num_hidden_layers=1, num_attention_heads=2, patch_size=14)
    Dinov2WithRegistersModel(registers).save_pretrained(path / "facebook" / "dinov2-with-registers-small")
    return path


def test_the_readme_has_snippets():
    assert len(SNIPPETS) >= 6


@pytest.mark.parametrize("index", range(len(SNIPPETS)))
def test_snippet_runs(folder, monkeypatch, capsys, index):
    monkeypatch.chdir(folder)
    exec(compile(SNIPPETS[index], f"README.md, snippet {index + 1}", "exec"), {"__name__": "__main__"})
    if "print(" in SNIPPETS[index]:
        assert capsys.readouterr().out.strip()


def test_the_snippets_of_the_page_on_features_run_after_its_first_commands(folder, monkeypatch, capsys):
    page = (ROOT / "docs" / "features.md").read_text(encoding="utf-8")
    monkeypatch.chdir(folder)
    commands = re.findall(r"^vivit-hf (.* (?:demo_output/|--duplicates ).*)$", page, flags=re.MULTILINE)
    assert [command.split()[0] for command in commands] == ["embed", "embed", "search", "search"]
    for command in commands:
        result = invoke(*shlex.split(command))
        assert result.exit_code == 0 and result.stdout.strip(), f"{command}: {result.stderr}"
    for snippet in re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL):
        exec(compile(snippet, "docs/features.md", "exec"), {"__name__": "__main__"})
        assert capsys.readouterr().out.strip()


def test_the_snippet_of_the_page_on_streams_counts_steps(capsys):
    page = (ROOT / "docs" / "streams.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    exec(compile(snippet, "docs/streams.md", "exec"), {"__name__": "__main__"})
    assert re.fullmatch(r"[1-9]\d* steps encoded, \d+ reused\n", capsys.readouterr().out)


def test_the_snippets_of_the_page_on_probabilities_run(capsys):
    page = (ROOT / "docs" / "how_sure.md").read_text(encoding="utf-8")
    snippets = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    assert snippets
    for snippet in snippets:
        exec(compile(snippet, "docs/how_sure.md", "exec"), {"__name__": "__main__"})
        assert capsys.readouterr().out.strip()


def test_the_snippet_of_the_page_on_lengths_classifies_both_clips(capsys):
    page = (ROOT / "docs" / "lengths.md").read_text(encoding="utf-8")
    (snippet,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    exec(compile(snippet, "docs/lengths.md", "exec"), {"__name__": "__main__"})
    assert re.fullmatch(r"([a-z][\w ]* [01]\.\d\d\n){2}", capsys.readouterr().out)


SMALL = {
    "finetune.py": ["--max_steps", "1", "--use_cpu", "--num_frames", "4", "--num_clips", "1", "--num_crops", "1"],
    "evaluate.py": ["--use_cpu", "--num_workers", "0"],
    "classify_dataset.py": ["--use_cpu", "--num_workers", "0"],
}


def test_the_commands_for_training_run_one_after_the_other(folder):
    """With a step instead of epochs: the lines are those of the README, and each goes on from what is there."""
    text = README.read_text(encoding="utf-8").replace("\\\n", " ")
    commands = [shlex.split(line) for line in re.findall(r"^python (examples/.*)$", text, flags=re.MULTILINE)]
    assert [Path(command[0]).name for command in commands] == list(SMALL)
    for script, *arguments in commands:
        small = SMALL[Path(script).name]
        process = subprocess.run(
            [sys.executable, str(README.parent / script), *arguments, *small],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert process.returncode == 0, f"{script}: {process.stderr[-2000:]}"
    assert (folder / "scores" / "confusion_matrix.png").exists() and (folder / "labels" / "part-00000.parquet").exists()


def test_the_outputs_are_what_the_commands_print_today():
    process = subprocess.run(
        [sys.executable, str(README.parent / "examples" / "update_readme.py"), "--check"],
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    assert README.read_text(encoding="utf-8").count("<!-- output of: ") >= 4


def test_the_first_snippet_runs_in_an_interpreter_of_its_own(folder):
    process = subprocess.run(
        [sys.executable, "-c", SNIPPETS[0]], cwd=folder, capture_output=True, text=True, timeout=120
    )
    assert process.returncode == 0, process.stderr[-2000:]
    lines = [line.split() for line in process.stdout.splitlines()]
    assert len(lines) == 3 and all(label in MOTIONS and 0 <= float(score) <= 1 for label, score in lines)


def test_numbers_of_the_variants_table_are_the_counted_ones():
    """The first number of each cell is ours, the one in brackets the paper's."""
    rows = re.findall(r"^\| `factorised.*$|^\| `spatio.*$", README.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert len(rows) == len(PAPER) == 5
    for row, (preset, parameters, multiply_adds) in zip(rows, PAPER, strict=True):
        cells = [cell.strip() for cell in row.split("|")]
        counted = count(preset)
        assert cells[3] == f"{counted[0]:.2f} ({parameters})"
        assert cells[4] == f"{counted[1]:.1f} ({multiply_adds})"


DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md")]
LINKS = sorted(
    {
        (document.relative_to(ROOT).as_posix(), target)
        for document in DOCUMENTS
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", document.read_text(encoding="utf-8"))
    }
)


@pytest.mark.parametrize(("document", "target"), LINKS)
def test_links_to_files_lead_somewhere(document, target):
    assert (ROOT / document).parent.joinpath(target).exists()
