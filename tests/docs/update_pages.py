"""Put what commands and snippets print today into the pages, and what they draw into docs/pictures.

    python tests/docs/update_pages.py            all pages
    python tests/docs/update_pages.py README.md docs/video.md

Below `<!-- output -->` stands what the code block above prints, below `<!-- output of: COMMAND -->` what this command
prints. tests/docs checks the same outputs.
"""

import shutil
import sys
import tempfile
from pathlib import Path


HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE), str(HERE.parent.parent / "examples")]

import conftest  # noqa: E402, F401  # no network, one thread
from page_files import write_page_files  # noqa: E402
from page_runner import PageRunner, new_pictures  # noqa: E402
from pages import PAGES, PICTURES, name_of, without_times  # noqa: E402


def main(arguments: list[str]) -> None:
    """Run the pages with these names, by default all, and rewrite those whose outputs have changed."""
    chosen = [page for page in PAGES if not arguments or name_of(page) in arguments]
    with tempfile.TemporaryDirectory() as temporary:
        template = Path(temporary, "template")
        write_page_files(template)
        for page in chosen:
            before = text = page.read_text(encoding="utf-8")
            runner = PageRunner(template, Path(temporary, page.stem))
            for block, printed in runner.run(page):
                if without_times(block.text) != without_times(printed):
                    new = f"{block.source.removesuffix(f'{block.text}```')}{printed}```"
                    text = text.replace(block.source, new, 1)
            if text != before:
                page.write_text(text, encoding="utf-8")
            for picture in new_pictures(page, runner.folder):
                shutil.copyfile(picture, PICTURES / picture.name)
            print(f"{name_of(page)}: {'new outputs' if text != before else 'as before'}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
