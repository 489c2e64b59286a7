"""`import vivit_hf` is quick, and the Auto classes know ViViT in any order of imports."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

import vivit_hf
from vivit_hf.cli.app import app


WINGS = sorted(path.parent.name for path in Path(vivit_hf.__file__).parent.glob("*/__init__.py"))
PACKAGES = ["vivit_hf", *(f"vivit_hf.{wing}" for wing in WINGS if wing != "cli")]
COMMANDS = list(get_command(app).commands)
COMMANDS += [f"convert {name}" for name in get_command(app).commands["convert"].commands]
SLOW = ("torch", "transformers", "numpy", "av")


def run(program):
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr[-2000:]
    return process.stdout


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_imports_nothing_slow(command):
    program = f"""
import sys
from vivit_hf.cli.app import main
sys.argv = ["vivit-hf", *{command!r}.split(), "--help"]
try:
    main()
except SystemExit:
    print("loaded:", sorted(sys.modules.keys() & {set(SLOW)}))
"""
    printed = run(program)
    assert "usage: " in printed.lower() and printed.splitlines()[-1] == "loaded: []"


@pytest.mark.parametrize(
    "imports",
    [
        "import vivit_hf; from transformers import AutoConfig",
        "import vivit_hf; from transformers import ViTModel",  # modeling_layers imports the Auto classes half-way
        "from transformers import pipeline; import vivit_hf",
        "from vivit_hf.modeling_vivit import ViViTModel",
        "import importlib, vivit_hf; importlib.reload(vivit_hf)",  # as IPython's autoreload does
    ],
)
def test_the_auto_classes_know_vivit_whatever_is_imported_first(imports):
    program = f"""
{imports}
from transformers.models.auto.modeling_auto import MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING, MODEL_MAPPING
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING
from transformers.models.auto.video_processing_auto import VIDEO_PROCESSOR_MAPPING
from transformers import AutoConfig
from transformers.pipelines import SUPPORTED_TASKS
import sys
config = type(AutoConfig.for_model("vivit_hf"))
models = [mapping[config].__name__ for mapping in (MODEL_MAPPING, MODEL_FOR_VIDEO_CLASSIFICATION_MAPPING)]
print(*models, IMAGE_PROCESSOR_MAPPING[config]["pil"].__name__, config in VIDEO_PROCESSOR_MAPPING)
print(SUPPORTED_TASKS["video-classification"]["impl"].__name__)
print([finder for finder in sys.meta_path if type(finder).__module__.startswith("vivit_hf")])
"""
    known, task, left = run(program).splitlines()
    assert known == "ViViTModel ViViTForVideoClassification ViViTVideoProcessor True"
    assert task == "ViViTVideoClassificationPipeline" and left == "[]"


@pytest.mark.parametrize("package", PACKAGES)
def test_exports_exist_and_are_known_to_type_checkers(package):
    module = importlib.import_module(package)
    (typed,) = [node for node in ast.parse(Path(module.__file__).read_text()).body if isinstance(node, ast.If)]
    homes = {alias.asname: f"{package}.{node.module}" for node in typed.body for alias in node.names}
    assert sorted(homes) == module.__all__
    for name, home in homes.items():
        assert getattr(module, name) is getattr(importlib.import_module(home), name)
        assert name in dir(module)
    with pytest.raises(AttributeError, match="no attribute 'ViVit'"):
        _ = module.ViVit


@pytest.mark.parametrize("package", PACKAGES)
def test_no_export_has_the_name_of_a_module(package):
    """Importing the module would hide the export."""
    module = importlib.import_module(package)
    assert not set(module.__all__) & {path.stem for path in Path(module.__file__).parent.iterdir()}


def test_what_a_command_does_not_use_is_not_imported():
    program = """
import sys
from vivit_hf.data import find_videos
from vivit_hf.hub.import_hooks import call_after_import
import vivit_hf.inference, vivit_hf.training, vivit_hf.explain, vivit_hf.conversion, vivit_hf.initialisation
print(sorted(sys.modules.keys() & {"torch", "transformers", "datasets"}))
"""
    assert run(program).strip() == "[]"
