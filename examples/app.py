"""
Starts the page of examples/space: upload or record a clip, and see labels, timeline and where the model looked.

    python examples/app.py                                       the demo model that comes with the package
    python examples/app.py --model my_vivit --model user/vivit   more to choose from: folders or Hub ids

The code stands in space/app.py, because that folder is copied to a Hugging Face Space as it is (see its README.md).
"""

import runpy
from pathlib import Path


if __name__ == "__main__":
    runpy.run_path(str(Path(__file__).parent / "space" / "app.py"), run_name="__main__")
