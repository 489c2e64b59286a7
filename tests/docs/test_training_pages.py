"""The pages whose commands train run from top to bottom, and show what they print."""

import pytest
from page_checks import TRAINING_PAGES, check_page
from page_files import write_page_files
from pages import name_of


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages") / "template"
    write_page_files(folder)
    return folder


@pytest.mark.parametrize("page", TRAINING_PAGES, ids=name_of)
def test_page(page, template, tmp_path):
    check_page(page, template, tmp_path)
