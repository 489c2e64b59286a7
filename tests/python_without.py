"""An interpreter with the libraries of this one, except for some."""

import sys
from pathlib import Path

import numpy
import torch
import transformers


def python_without(site, *missing):
    """Link the libraries into the new folder `site`, and return the command that runs a script with its arguments."""
    site.mkdir()
    for library in {Path(module.__file__).parents[1] for module in (torch, numpy, transformers)}:
        for entry in library.iterdir():
            name = entry.name.partition(".")[0].partition("-")[0]
            if name not in missing and entry.suffix != ".pth" and not (site / entry.name).exists():
                (site / entry.name).symlink_to(entry)
    # Use neither PYTHONPATH nor site-packages, whose .pth files add packages that are installed for development.
    program = f"import runpy, sys; sys.path.append({str(site)!r}); sys.argv.pop(0); "
    program += "runpy.run_path(sys.argv[0], run_name='__main__')"
    return [sys.executable, "-I", "-S", "-c", program]
