"""The page of examples/app.py as a visitor uses it, in a browser."""

import json
import re
import sys

import av
import numpy as np
import pytest
from moving_shapes import MOTIONS, Scene
from paths import ROOT
from PIL import Image
from served_page import DEMO, Page, open_browser, serving, write_clip
from typer.testing import CliRunner
from video_files import write_video as write_any_video


sys.path.append(str(ROOT / "benchmarks"))

from strange_videos import write_strange_videos

from vivit_hf import ViViTForVideoClassification, ViViTVideoProcessor, demo_model_path
from vivit_hf.cli.app import app


pytestmark = pytest.mark.slow


def other_model(folder):
    """The demo model with another name for a label, and without a calibration."""
    for cls in (ViViTForVideoClassification, ViViTVideoProcessor):
        loaded = cls.from_pretrained(demo_model_path())
        if cls is ViViTForVideoClassification:
            loaded.config.calibration = None
            loaded.config.id2label = {**loaded.config.id2label, 1: "to the lower right"}
        loaded.save_pretrained(folder)
    return folder


def write_library(folder):
    """Features of the demo model for two videos of a folder that may be shown, and one of a folder that may not."""
    (folder / "shown").mkdir(parents=True)
    (folder / "hidden").mkdir()
    write_clip(folder / "shown" / "up.mp4", "up_left", seed=5)
    write_clip(folder / "shown" / "down.mp4", "down_right", seed=5)
    write_clip(folder / "hidden" / "secret.mp4", "down_right", seed=6)
    parts = [str(folder / name) for name in ("shown", "hidden")]
    result = CliRunner().invoke(app, ["embed", *parts, "--workers", "0", "--output", str(folder / "features.parquet")])
    assert result.exit_code == 0, result.output
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("app")


@pytest.fixture(scope="module")
def address(folder):
    limits = ["--max-seconds", "3", "--max-megabytes", "0.5"]
    models = ["--model", "/nowhere/my_vivit", "--model", str(other_model(folder / "other"))]
    library = write_library(folder / "library")
    index = ["--features", str(library / "features.parquet"), "--show-from", str(library / "shown")]
    with serving(folder, ROOT / "examples" / "app.py", *limits, *models, *index) as where:
        yield where


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with open_browser(tmp_path_factory.mktemp("chromium")) as driver:
        yield driver


@pytest.fixture
def page(browser, address):
    return Page(browser, address)


def write_sound(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 16000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 16000
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)
    return path


def requested_hosts(driver):
    """Whom the page asked for anything since this was last called."""
    messages = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    urls = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    return {re.sub(r"^(\w+://[^/]*/|\w+:).*", r"\1", url, flags=re.DOTALL) for url in urls}


def test_an_uploaded_clip_gets_labels_a_timeline_and_pictures(page, tmp_path):
    """The clip has no sound."""
    requested_hosts(page.driver)
    page.driver.refresh()
    page.upload(write_clip(tmp_path / "shape.mp4", "up_left"))
    page.choose_model(DEMO)
    text, is_error = page.classify("shape.mp4")
    assert not is_error and "shape.mp4: 2.0 seconds, 24 frames of 96 x 80" in text

    labels = page.labels()
    assert labels[0][0] == "up_left" and int(labels[0][1]) > 60
    assert {name for name, _ in labels} == set(MOTIONS)
    assert page.read("#timeline", r"start \(s\) end \(s\) label score\n0\.00 \S+ up_left ")
    assert page.read("#timeline", r"0 s\n") and page.all("#timeline .track span")
    sure = page.read("#labels", r"How sure\n(?:.|\n)*")[0]
    assert "calibrated on 200 labelled files" in sure and "The temperature 1.60 makes scores less sure" in sure
    assert "The label set at 90% coverage is 'up_left'" in sure and "4 clips x 3 crops" in sure
    heads = [one.text for one in page.all(".story h3") if one.text]
    assert heads == ["What happens", "How sure", "When", "Where the model looked"]
    assert page.read("#caption", r"it decided, with the highest score for 'up_left'")
    for name in ("overlay", "sheet"):
        picture = page.until(lambda name=name: page.all(f"#{name} img"), name)[0]
        page.until(lambda picture=picture: picture.get_property("complete"))
        assert picture.get_property("naturalWidth") > 200 and picture.is_displayed()

    screenshot = tmp_path / "page.png"
    page.driver.save_screenshot(str(screenshot))
    assert len(Image.open(screenshot).convert("RGB").getcolors(1 << 24)) > 1000  # not an empty page
    assert page.overflow() <= 0
    severe = [entry["message"] for entry in page.driver.get_log("browser") if entry["level"] == "SEVERE"]
    assert severe == []
    hosts = {host for host in requested_hosts(page.driver) if not host.startswith(("data:", "blob:", "chrome"))}
    assert len(hosts) == 1 and hosts.pop().startswith("http://127.0.0.1:")


def test_a_recording_has_no_duration_in_its_header(page, tmp_path):
    """As browsers record: WebM that is written while it is filmed. (Headless ones record nothing on a busy machine.)"""
    page.until(lambda: page.all("#video [aria-label='Capture from camera']"), "button for the camera")
    frames = Scene.draw(np.random.default_rng([77, 2]), 24, height=80, width=96).render("down_right", 24)
    options = {"codec": "libvpx", "options": {"deadline": "realtime", "crf": "10", "b": "1M"}, "rate": 12}
    path = write_any_video(tmp_path / "sample.webm", frames, container_options={"live": "1"}, **options)
    with av.open(str(path)) as container:
        assert container.duration is None
    page.upload(path)
    page.choose_model(DEMO)
    text, is_error = page.classify("sample.webm")
    assert not is_error and "2.0 seconds, 24 frames" in text
    assert page.labels()[0][0] == "down_right"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("damaged.mp4", r"Cannot read damaged\.mp4: .* It may be damaged"),
        ("sound.mp4", r"Cannot read sound\.mp4: it has no video stream"),
        ("long.mp4", r"long\.mp4 is too long: it lasts 5 seconds, and this page accepts up to 3 seconds"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_with_the_reason(page, tmp_path, name, message):
    path = tmp_path / name
    if name == "damaged.mp4":
        whole = write_clip(path, "up_left").read_bytes()
        path.write_bytes(whole[: len(whole) // 3])
    elif name == "sound.mp4":
        write_sound(path)
    else:
        write_clip(path, "up_left", num_frames=60)
    page.upload(path)
    text, is_error = page.classify(name)
    assert is_error and re.match(message, text), text
    assert "Traceback" not in page.one("body").text
    assert not page.all("#overlay img") and not page.all("#timeline table")


def test_a_file_that_is_too_large_is_refused_before_it_is_sent(page, tmp_path):
    path = tmp_path / "large.mp4"
    path.write_bytes(bytes(600_000))
    page.until(lambda: page.all("#video input[type=file]"))[0].send_keys(str(path))
    (error,) = page.until(lambda: page.all("#status .error"), "error")
    assert error.text.startswith("large.mp4 is too large: it has 0.6 MB, and this page accepts up to 0.5 MB.")
    assert page.all("#video input[type=file]") and not page.all("#video video")


def test_a_page_without_a_video_and_a_model_that_is_not_there_say_so(page, tmp_path):
    text, is_error = page.classify("no video")
    assert is_error and "upload a file or record one" in text
    page.upload(write_clip(tmp_path / "shape.mp4", "up_left"))
    text, is_error = page.classify("/nowhere/my_vivit")  # the first on the list
    assert is_error and text.startswith("Cannot load the model '/nowhere/my_vivit': ")


def test_a_strange_video_is_none_of_these(page, tmp_path):
    page.upload(next(one for one in write_strange_videos(tmp_path, 1) if "noise" in one.name))
    page.choose_model(DEMO)
    _, is_error = page.classify("seconds")
    assert not is_error and page.read("#labels", r"What happens\n(.*)") == ["none of these"]
    (sentence,) = page.read("#labels", r"None of these: .*")
    assert "unlike those that the model was trained on. Its nearest label is '" in sentence
    assert not page.all("#labels .bar")


def test_two_models_are_compared_side_by_side(page, folder, tmp_path):
    page.upload(write_clip(tmp_path / "shape.mp4", "down_right"))
    page.open_tab("Compare")
    for place in ("#model-0", "#model-1"):
        page.choose_model(DEMO, place)
    text, is_error = page.press("#compare", "#compare-status", "same model")
    assert is_error and "choose two different ones" in text
    other = str(folder / "other")
    page.choose_model(other, "#model-1")
    text, is_error = page.press("#compare", "#compare-status", "24 frames")
    assert not is_error and "shape.mp4" in text
    (verdict,) = page.read("#verdict", r"The models .*")
    assert verdict == (
        f"The models differ: '{DEMO}' says 'down_right'; {other!r} says 'to the lower right'. '{DEMO}' cannot say "
        f"'to the lower right'. {other!r} cannot say 'down_right'."
    )
    first, second = (page.read(f"#side-{number}", r"(?s).*")[0] for number in range(2))
    assert "It took " in first and "calibrated on 200 labelled files" in first
    assert "It took " in second and "not calibrated" in second
    assert page.overflow() <= 0


def test_similar_videos_are_found_and_only_those_in_allowed_folders_are_shown(page, tmp_path):
    page.upload(write_clip(tmp_path / "shape.mp4", "down_right", seed=5))
    page.open_tab("Search by video")
    text, is_error = page.press("#search", "#search-status", "24 frames")
    assert not is_error and "Compared with 3 videos" in text
    rows = page.until(lambda: page.all("#matches .match"), "matches")
    assert rows[0].text.split("\n") == ["shown/down.mp4", "1.000"]
    assert {row.text.split("\n")[0]: len(row.find_elements("css selector", "img")) for row in rows} == {
        "shown/down.mp4": 1,
        "shown/up.mp4": 1,
        "hidden/secret.mp4": 0,
    }
    picture = rows[0].find_element("css selector", "img")
    assert picture.get_property("naturalWidth") > 200 and picture.get_attribute("src").startswith("data:image/jpeg")
    assert "library" not in page.one("#matches").get_attribute("innerHTML")  # no path of the server


def test_nothing_is_wider_than_a_phone(browser, address, tmp_path):
    size = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        page = Page(browser, address)
        bottom = page.driver.execute_script("return arguments[0].getBoundingClientRect().bottom", page.one("#classify"))
        assert page.overflow() <= 0 and bottom <= 844  # the button can be seen without scrolling
        page.upload(write_clip(tmp_path / "shape.mp4", "up_left"))
        page.choose_model(DEMO)
        assert not page.classify("shape.mp4")[1]
        page.until(lambda: page.all("#sheet img"), "pictures")
        assert page.overflow() <= 0
        for tab, button in (("Search by video", "#search"), ("Compare", "#compare")):
            page.open_tab(tab)
            assert page.until(lambda button=button: page.all(button))[0].is_displayed() and page.overflow() <= 0
    finally:
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
