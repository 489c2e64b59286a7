"""`import vivit_hf` is quick, and yet the Auto classes know ViViT, whichever is imported first."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import vivit_hf


SLOW = ("torch", "transformers", "numpy", "av")


def run(program):
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert process.returncode == 0, process.stderr[-2000:]
    return process.stdout


@pytest.mark.parametrize(
    "arguments", [[], ["classify"], ["timeline"], ["explain"], ["inspect"], ["scan"], ["demo"]], ids=str
)
def test_help_imports_nothing_slow(arguments):
    program = f"""
import sys
from vivit_hf.cli.app import main
sys.argv = ["vivit-hf", *{arguments}, "--help"]
try:
    main()
except SystemExit:
    print("loaded:", sorted(sys.modules.keys() & {set(SLOW)}))
"""
    printed = run(program)
    assert "Usage" in printed and printed.splitlines()[-1] == "loaded: []"


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


def test_what_is_exported_is_there_and_known_to_type_checkers():
    tree = ast.parse(Path(vivit_hf.__file__).read_text(encoding="utf-8"))
    (typed,) = [node for node in tree.body if isinstance(node, ast.If)]
    names = {alias.name: node.module for node in typed.body for alias in node.names}
    assert names == vivit_hf._MODULES and sorted(names) == sorted(vivit_hf.__all__)
    for name in vivit_hf.__all__:
        assert getattr(vivit_hf, name).__module__ == f"vivit_hf.{names[name]}" and name in dir(vivit_hf)
    with pytest.raises(AttributeError, match="no attribute 'ViVit'"):
        _ = vivit_hf.ViVit
