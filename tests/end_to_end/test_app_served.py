"""The page of examples/app.py as programs and Spaces use it, and the models that it loads."""

import html
import re
import runpy
import shutil

import psutil
import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from huggingface_hub import SpaceCard
from paths import ROOT
from PIL import Image
from served_page import DEMO, SPACE, serving


pytestmark = pytest.mark.slow


def test_the_folder_and_the_package_are_a_space_as_they_stand(tmp_path):
    """Laid out as the two uploads of its README.md lay it out; the package beside app.py is the one that is used."""
    space = tmp_path / "space"
    shutil.copytree(SPACE, space)
    shutil.copytree(ROOT / "src" / "vivit_hf", space / "vivit_hf", ignore=shutil.ignore_patterns("__pycache__"))
    with open(space / "vivit_hf" / "__init__.py", "a") as file:
        file.write("print('the package of the Space')\n")
    with serving(space, "app.py") as where:
        client = Client(where, verbose=False, download_files=tmp_path)
        status, data, *_, overlay, sheet = client.predict(
            handle_file(space / "clips" / "down_right.mp4"), DEMO, "attention rollout", api_name="/classify"
        )
    assert "the package of the Space" in (space / "log.txt").read_text()
    assert "down_right.mp4: 2.0 seconds" in status and data["answers"] == ["down_right"]
    assert Image.open(overlay).n_frames == 16 and Image.open(sheet).width > 1000


def test_the_header_of_the_space_is_what_the_hub_reads():
    header = SpaceCard.load(SPACE / "README.md").data
    pins = dict(re.findall(r"^([\w.-]+)==([\w.]+)", (ROOT / "constraints.txt").read_text(), flags=re.MULTILINE))
    assert (header.sdk, header.sdk_version, header.license) == ("gradio", pins["gradio"], "apache-2.0")
    assert (SPACE / header.app_file).is_file() and header.title and len(header.short_description) <= 60
    assert {header.colorFrom, header.colorTo} <= set("red yellow green blue indigo purple pink gray".split())


def test_the_space_requires_what_the_package_requires():
    lines = (SPACE / "requirements.txt").read_text(encoding="utf-8").splitlines()
    (listed,) = re.findall(r"^dependencies = \[\n(.*?)^\]", (ROOT / "pyproject.toml").read_text(), flags=re.M | re.S)
    promised = re.findall(r'^  "(.*?)",', listed, flags=re.MULTILINE)
    assert [line for line in lines if line and not line.startswith(("#", "--"))] == promised


def test_only_models_of_the_list_and_of_the_hub_are_loaded(tmp_path, monkeypatch):
    """A visitor is not to look around in the folders of the server."""
    app = runpy.run_path(str(SPACE / "app.py"))
    offered = ["/srv/my model", app["DEMO"]]
    for name in ("/srv/my model", " owner/name-1.0 ", "Org_2/vivit.b"):
        assert app["check_model"](name, offered) == name.strip()
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for name in ("/etc", "..", "../x", ".hidden/x", "a/b/c", "name", "C:/x", "owner/name", "owner/na me", "ö/x"):
        with pytest.raises(app["UserError"], match="is not a Hub id"):
            app["check_model"](name, offered)
    for name in (None, "  "):
        with pytest.raises(app["UserError"], match="There is no model yet"):
            app["check_model"](name, offered)


@pytest.mark.parametrize("name", [["owner/name"], {"a": 1}, 7, 1.5, True])
def test_a_model_is_chosen_by_text(name):
    app = runpy.run_path(str(SPACE / "app.py"))
    with pytest.raises(app["UserError"], match=f"not by a {type(name).__name__}"):
        app["check_model"](name, [app["DEMO"]])


def test_a_page_can_keep_to_its_list():
    app = runpy.run_path(str(SPACE / "app.py"))
    assert app["check_model"](app["DEMO"], [app["DEMO"]], only_listed=True) == app["DEMO"]
    with pytest.raises(app["UserError"], match="'owner/name' is not on the list of models"):
        app["check_model"]("owner/name", [app["DEMO"]], only_listed=True)


@pytest.fixture(scope="module")
def strict_page(tmp_path_factory):
    """A page that keeps to its list, with a deadline that no job meets; a client of it."""
    folder = tmp_path_factory.mktemp("strict")
    arguments = ("--only-listed", "--job-seconds", "0.05", "--max-megabytes", "0.5")
    with serving(folder, ROOT / "examples" / "app.py", *arguments) as where:
        yield Client(where, verbose=False, download_files=folder)


def ask(client, file, model, heat="attention rollout"):
    """The text of the status, as programs get it."""
    status, *_ = client.predict(handle_file(file), model, heat, api_name="/classify")
    return html.unescape(re.sub("<.*?>", "", status))


def test_a_served_page_ends_jobs_at_the_deadline(strict_page):
    status = ask(strict_page, SPACE / "clips" / "up_left.mp4", DEMO)
    assert status.startswith("This took longer than 0.1 seconds and was stopped")


def test_a_served_page_loads_no_model_that_is_not_listed(strict_page):
    # Gradio refuses it before the page does: the list is closed.
    with pytest.raises(AppError):
        ask(strict_page, SPACE / "clips" / "up_left.mp4", "owner/name")


def test_a_served_page_refuses_uploads_that_are_too_large(strict_page, tmp_path):
    (tmp_path / "large.mp4").write_bytes(bytes(600_000))
    with pytest.raises(Exception, match=r"413|size|large"):
        ask(strict_page, tmp_path / "large.mp4", DEMO)


def test_a_served_page_names_heat_maps_that_it_does_not_have(strict_page):
    with pytest.raises(AppError):
        ask(strict_page, SPACE / "clips" / "up_left.mp4", DEMO, "x-ray")


def test_the_page_starts_within_10_seconds(tmp_path):
    """Of processor time, which other tests do not take away: about the time that an idle machine needs."""
    with serving(tmp_path, ROOT / "examples" / "app.py"):
        (page,) = [one for one in psutil.Process().children() if one.cwd() == str(tmp_path)]
        of_all = [one.cpu_times() for one in (page, *page.children(recursive=True))]
        assert sum(times.user + times.system for times in of_all) < 10


def test_a_name_is_text_whatever_is_in_it():
    app = runpy.run_path(str(SPACE / "app.py"))
    name = '"><script>alert(1)</script>'
    row = {"group": name, "label": name, "score": 0.5, "is_given": True, "is_value": False, "threshold": 0.5}
    what = {"answers": [name], "rows": [row, {**row, "is_value": True}]}
    for made in (
        app["box"](name),
        app["where_html"](name),
        app["when_html"]([(0.0, 1.0, name, 0.5)]),
        app["what_html"](what, [name], name),
    ):
        assert html.escape(name) in made and name not in made
