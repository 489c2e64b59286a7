"""Start the page in examples/space: upload or record a clip, and see labels, timeline and where the model looked.

    python examples/app.py                                       the demo model that comes with the package
    python examples/app.py --model my_vivit --model user/vivit   offers more models: folders or Hub ids

The code is in space/app.py, because that folder is copied to a Hugging Face Space as it is (see its README.md).
"""

import runpy
from pathlib import Path


if __name__ == "__main__":
    runpy.run_path(str(Path(__file__).parent / "space" / "app.py"), run_name="__main__")
