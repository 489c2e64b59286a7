"""What every page must pass that has code, for the files among which the pages are divided: workers share them."""

from pathlib import Path

from page_runner import PageRunner, new_pictures
from pages import PAGES, without_times


# The pages whose commands train: half of the time. What is not here is in test_other_pages.py.
TRAINING = {"README", "distillation", "few_labels", "fine_tuning", "pretraining", "probes", "real_model"}
TRAINING_PAGES = [page for page in PAGES if page.stem in TRAINING]
OTHER_PAGES = [page for page in PAGES if page.stem not in TRAINING]


def check_page(page: Path, template: Path, folder: Path) -> None:
    """Run the code of a page from top to bottom; what it prints and draws must be what the page shows."""
    runner = PageRunner(template, folder / page.stem)
    for block, printed in runner.run(page):
        assert without_times(printed) == without_times(block.text), f"{block.place}: make readme renews the outputs"
    assert not new_pictures(page, runner.folder), "make readme renews the pictures"
