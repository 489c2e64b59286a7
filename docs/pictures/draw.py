"""Draw the pictures of the documentation that no command on a page draws (`make readme`).

python docs/pictures/draw.py                 all of them; the page needs chromium and chromium-driver
python docs/pictures/draw.py sampling        this one
"""

import argparse
import importlib
from pathlib import Path


FOLDER = Path(__file__).resolve().parent
NAMES = ("sampling", "attention", "reliability", "page")


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the pictures of the documentation.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"by default all: {', '.join(NAMES)}")
    names = parser.parse_args().names or NAMES
    if unknown := set(names) - set(NAMES):
        parser.error(f"there is no picture {min(unknown)!r}: choose from {', '.join(NAMES)}")
    for name in names:
        drawn = importlib.import_module(name).main(FOLDER)
        for path in drawn if isinstance(drawn, list) else [drawn]:
            print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
