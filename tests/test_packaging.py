"""Packaging: both archives, the wheel in a clean environment, and the supported versions of dependencies."""

import ast
import json
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from email import message_from_bytes
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version
from paths import ROOT

import vivit_hf


pytestmark = pytest.mark.slow


ARCHIVE = f"vivit_hf-{vivit_hf.__version__}"
VIDEO_EXTRAS = ("torchvision", "torchcodec", "torchaudio", "decord", "cv2")

# Import the package and run it; the tests check the printed results, where a failed assert shows the values.
PROGRAM = """
import json, sys
import torch
import vivit_hf

config = vivit_hf.ViViTConfig(
    image_size=16, num_frames=4, tubelet_size=(2, 8, 8), hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
    intermediate_size=16, num_labels=3,
)
model = vivit_hf.ViViTForVideoClassification(config).eval()
with torch.no_grad():
    logits = model(torch.zeros(2, 4, 3, 16, 16)).logits
frames = [[[[index] * 3] * 20] * 24 for index in range(0, 60, 10)]
processor = vivit_hf.ViViTVideoProcessor(
    num_frames=4, size={"shortest_edge": 18}, crop_size={"height": 16, "width": 16}
)
pixels = processor(torch.tensor(frames, dtype=torch.uint8).numpy(), return_tensors="pt")["pixel_values"]
print(json.dumps({
    "file": vivit_hf.__file__,
    "modules": sorted(sys.modules),
    "logits": list(logits.shape),
    "finite": bool(logits.isfinite().all()),
    "pixels": list(pixels.shape),
}))
"""


@pytest.fixture(scope="module")
def archives(tmp_path_factory) -> tuple[Path, Path]:
    """Return the sdist and the wheel built from that sdist."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT)
    return folder / f"{ARCHIVE}.tar.gz", folder / f"{ARCHIVE}-py3-none-any.whl"


@pytest.fixture(scope="module")
def metadata(archives):
    with zipfile.ZipFile(archives[1]) as wheel:
        return message_from_bytes(wheel.read(f"{ARCHIVE}.dist-info/METADATA"))


@pytest.fixture(scope="module")
def clean_environment(archives, tmp_path_factory) -> Path:
    """Return the Python of a virtual environment with the wheel and this environment's other packages."""
    folder = tmp_path_factory.mktemp("clean")
    venv.create(folder, with_pip=True, symlinks=os.name != "nt")
    scheme = sysconfig.get_preferred_scheme("prefix")
    variables = {"base": str(folder), "platbase": str(folder)}
    # Install the wheel before the other packages are visible: pip would replace an editable vivit_hf among them.
    python = Path(sysconfig.get_path("scripts", scheme, variables), Path(sys.executable).name)
    run(python, "-m", "pip", "install", "--no-index", "--no-deps", archives[1])
    # Python ignores path files in folders that a path file adds, so editable installations stay invisible.
    shared = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    site_packages = Path(sysconfig.get_path("purelib", scheme, variables))
    (site_packages / "shared.pth").write_text("\n".join(sorted(shared)) + "\n")
    return python


BESIDES_ALL = {"docs", "gpu"}  # extras that `all` leaves out


def run(*command: object, **environment: str) -> str:
    """Run a command outside the repository and return its output; show the output if it fails."""
    process = subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        timeout=240,
        cwd=Path(sys.prefix),
        env={**os.environ, **environment},
    )
    assert process.returncode == 0, f"{command}:\n{process.stdout[-2000:]}\n{process.stderr[-4000:]}"
    return process.stdout


def requirements(path: Path) -> dict[str, str]:
    """Return the pinned versions of a constraints file that apply to this Python, by normalised name."""
    lines = (line.partition("#")[0].strip() for line in path.read_text().splitlines())
    parsed = [Requirement(line) for line in lines if line]
    applying = [requirement for requirement in parsed if requirement.marker is None or requirement.marker.evaluate()]
    pins = {normalised(requirement): str(requirement.specifier) for requirement in applying}
    assert len(pins) == len(applying), f"a name stands twice in {path.name}"
    assert all(pin.startswith("==") for pin in pins.values()), pins
    return {name: pin.removeprefix("==") for name, pin in pins.items()}


def normalised(requirement: Requirement) -> str:
    return re.sub(r"[-_.]+", "-", requirement.name).lower()


def floor(requirement: Requirement) -> str:
    (lower,) = [specifier.version for specifier in requirement.specifier if specifier.operator == ">="]
    return lower


def required(metadata, *extras: str) -> list[Requirement]:
    """Return the requirements of the package with these extras."""
    parsed = map(Requirement, metadata.get_all("Requires-Dist"))
    return [
        requirement
        for requirement in parsed
        if requirement.marker is None or any(requirement.marker.evaluate({"extra": extra}) for extra in extras)
    ]


def test_the_wheel_holds_the_package_and_nothing_else(archives):
    with zipfile.ZipFile(archives[1]) as wheel:
        names = set(wheel.namelist())
    package = ROOT / "src" / "vivit_hf"
    modules = {f"vivit_hf/{path.relative_to(package).as_posix()}" for path in package.rglob("*.py")}
    about = {name for name in names if name.startswith(f"{ARCHIVE}.dist-info/")}
    demo_model = {
        f"vivit_hf/{path.relative_to(package).as_posix()}"
        for path in (package / "demo_model").rglob("*")
        if path.is_file()
    }
    assert len(demo_model) == 9 and "vivit_hf/demo_model/model.safetensors" in demo_model
    assert names - about == modules | demo_model | {"vivit_hf/py.typed"}
    assert archives[1].stat().st_size < 4e6, "bytes; the demo model is most of it"
    assert {f"{ARCHIVE}.dist-info/licenses/{name}" for name in ("LICENSE", "NOTICE")} <= about


def test_the_sdist_holds_what_it_takes_to_test_and_use_the_repository(archives):
    with tarfile.open(archives[0]) as sdist:
        names = {name.removeprefix(f"{ARCHIVE}/") for name in sdist.getnames()}
    expected = {
        path.relative_to(ROOT).as_posix()
        for folder in ("src", "tests", "examples", "conversion", "benchmarks", "docs")
        for path in (ROOT / folder).rglob("*.*")
        if path.is_file() and not any(part.startswith((".", "__pycache__")) for part in path.relative_to(ROOT).parts)
    }
    assert {"src", "tests", "examples", "conversion"} <= {name.split("/")[0] for name in expected}
    files = {path.name for path in ROOT.glob("*.*") if path.is_file() and not path.name.startswith(".")}
    assert {"README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "pyproject.toml"} <= files
    assert expected | files | {"LICENSE", "NOTICE", "Makefile", "Dockerfile"} <= names
    assert not [name for name in names if re.search(r"__pycache__|\.pyc$|(^|/)\.venv|\.egg-info", name)]


def test_the_wheel_works_on_its_own_and_leaves_video_libraries_alone(clean_environment):
    result = json.loads(run(clean_environment, "-I", "-c", PROGRAM, HF_HUB_OFFLINE="1").splitlines()[-1])
    assert Path(result["file"]).is_relative_to(clean_environment.parent.parent)
    assert result["logits"] == [2, 3]
    assert result["finite"]
    assert result["pixels"] == [1, 4, 3, 16, 16]
    assert not set(VIDEO_EXTRAS) & set(result["modules"])


def test_a_broken_torchcodec_does_not_matter(clean_environment, tmp_path):
    # A torchcodec built for another torch is found, but fails on import. A broken torchvision is out of our hands:
    # transformers imports any that it finds.
    (tmp_path / "torchcodec").mkdir()
    (tmp_path / "torchcodec" / "__init__.py").write_text("raise RuntimeError('Could not load libtorchcodec')\n")
    (tmp_path / "torchcodec-0.1.0.dist-info").mkdir()
    (tmp_path / "torchcodec-0.1.0.dist-info" / "METADATA").write_text("Name: torchcodec\nVersion: 0.1.0\n")
    program = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{PROGRAM}"
    result = json.loads(run(clean_environment, "-I", "-c", program, HF_HUB_OFFLINE="1").splitlines()[-1])
    assert result["logits"] == [2, 3]
    assert result["pixels"] == [1, 4, 3, 16, 16]


def test_the_metadata_names_the_package(metadata):
    assert (metadata["Name"], metadata["Version"]) == ("vivit-hf", vivit_hf.__version__)
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.10"
    extras = {"conversion", "training", "export", "search", "probe", "serve", "app", "test", "dev", "all", *BESIDES_ALL}
    assert extras == set(metadata.get_all("Provides-Extra"))
    assert f"version: {vivit_hf.__version__}\n" in (ROOT / "CITATION.cff").read_text()


def test_the_oldest_versions_that_are_tested_are_the_oldest_that_are_promised(metadata):
    pins = requirements(ROOT / "constraints-oldest.txt")
    promised = {
        normalised(requirement): floor(requirement)
        for requirement in required(metadata, "conversion", "export", "training", "search", "probe", "serve", "app")
    }
    torch_floor = promised.pop("torch")  # named in the file, where the reason is given, but not pinned
    (oldest_torch,) = re.findall(r"OLDEST_TORCH=([\d.]+)", (ROOT / "constraints-oldest.txt").read_text())
    assert Version(oldest_torch) == Version(torch_floor)
    assert {name: Version(version) for name, version in promised.items()} == {
        name: Version(pins[name]) for name in promised
    }


def test_the_versions_that_are_tested_are_supported_and_pinned(metadata):
    pins = requirements(ROOT / "constraints.txt")
    for requirement in required(
        metadata, "conversion", "training", "export", "search", "probe", "serve", "app", "test", "dev", "docs"
    ):
        assert pins[normalised(requirement)] in requirement.specifier, requirement


def test_every_import_is_of_a_package_that_is_installed_with_this_one(metadata):
    """Of a requirement, or of what requirements require. What only tests or the page bring does not count."""
    names = packages_distributions()
    core = required(metadata, "conversion", "export", "training", "search", "probe", "gpu")
    for folder, requirements_of in (("", core), ("serving", [*core, *required(metadata, "serve")])):
        known = {normalised(one) for one in requirements_of}
        left = known - {"torchao"}  # not installed with the tests
        while left:
            further = [Requirement(line) for line in requires(left.pop()) or ()]
            here = {normalised(one) for one in further if one.marker is None or one.marker.evaluate({"extra": ""})}
            left |= here - known
            known |= here
        for path in (ROOT / "src" / "vivit_hf" / folder).rglob("*.py"):
            if folder or ("serving" not in path.parts and path.name != "serve.py"):
                packages = {package for one in imported(path) for package in names.get(one, [one])}
                assert {normalised(Requirement(one)) for one in packages} <= known, path


def imported(path):
    """The packages that a file imports, without those of Python and this one."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add(node.module)
    return {name.partition(".")[0] for name in found} - {"vivit_hf", *sys.stdlib_module_names}


def test_all_is_every_extra_but_those_apart(metadata):
    extras = set(metadata.get_all("Provides-Extra")) - {"all", *BESIDES_ALL}
    assert {one.name for one in required(metadata, "all")} == {one.name for one in required(metadata, *extras)}
