"""Run the notebooks in this folder from top to bottom, and store what they show today (`make readme`).

    python docs/notebooks/run.py                       all of them
    python docs/notebooks/run.py long_video.ipynb      one of them

They work offline, and write their files to temporary folders. Commands in them run in this Python's environment.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient


FOLDER = Path(__file__).resolve().parent
TIMEOUT = 240  # seconds for one cell


def run_notebook(file: Path) -> Any:
    """Return a notebook as it is after all of its cells have run. Raises CellExecutionError if one of them fails."""
    notebook = nbformat.read(file, as_version=4)
    # In the shell of a cell, `vivit-hf` is that of this environment.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    resources = {"metadata": {"path": FOLDER}}
    client = NotebookClient(
        notebook, timeout=TIMEOUT, kernel_name="python3", coalesce_streams=True, resources=resources
    )
    client.execute(env={**os.environ, "PATH": path, "HF_HUB_OFFLINE": "1", "COLUMNS": "100"})
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # when it ran
        if cell.cell_type == "code":
            cell.outputs = [kept for output in cell.outputs if (kept := without_extras(output)) is not None]
    return notebook


def without_extras(output: Any) -> Any:
    """Return an output without what changes from run to run or is there twice; None for warnings and progress bars."""
    if output.get("name") == "stderr":
        return None
    if "image/png" in output.get("data", {}):
        output.data = {"image/png": output.data["image/png"], "text/plain": "a picture"}
    return output


def main() -> None:
    parser = argparse.ArgumentParser(description="Run the notebooks, and store what they show.")
    parser.add_argument("names", nargs="*", help="such as long_video.ipynb; by default all")
    names = parser.parse_args().names or sorted(path.name for path in FOLDER.glob("*.ipynb"))
    for name in names:
        path = FOLDER / name
        nbformat.write(run_notebook(path), path)
        print(f"{name}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
