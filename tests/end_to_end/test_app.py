"""The page of examples/app.py as a visitor uses it: a process of its own, and a headless browser that is offline."""

import contextlib
import html
import importlib
import json
import os
import re
import runpy
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import av
import numpy as np
import pytest
import torch
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from huggingface_hub import SpaceCard
from moving_shapes import MOTIONS, Scene, write_video
from paths import ROOT
from PIL import Image
from selenium import webdriver
from selenium.common.exceptions import TimeoutException
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait
from tuned_models import tune_folder
from video_files import damage_packet, write_video as write_any_video

from vivit_hf import NonFiniteError, ViViTForVideoClassification, ViViTVideoProcessor, demo_model_path


pytestmark = pytest.mark.slow


SPACE = ROOT / "examples" / "space"
FLAGS = """--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
--disable-component-update --disable-sync --window-size=1280,1400""".split()
# The names of all other hosts lead nowhere, whatever this machine can reach.
OFFLINE = "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1"
DEMO = "demo (moving shapes)"
TIMEOUT = 120  # seconds, for a machine that is busy with other tests


@contextlib.contextmanager
def serving(folder, script, *arguments):
    """Runs a script that serves the page; gives its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    settings = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    environment = {**os.environ, **settings, "GRADIO_TEMP_DIR": str(folder / "gradio")}
    with open(folder / "log.txt", "w+") as log:
        process = subprocess.Popen(
            [sys.executable, str(script), "--host", "127.0.0.1", "--port", str(port), *arguments],
            cwd=folder,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            deadline = time.monotonic() + TIMEOUT
            while True:
                try:
                    urllib.request.urlopen(f"{address}/config", timeout=5).close()
                    break
                except OSError:
                    has_ended = process.poll() is not None
                    if has_ended or time.monotonic() > deadline:
                        log.seek(0)
                        pytest.fail(f"{script} does not serve its page (ended: {has_ended}): {log.read()[-3000:]}")
                    time.sleep(0.2)
            yield address
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    folder = tmp_path_factory.mktemp("app")
    limits = ["--max-seconds", "3", "--max-megabytes", "0.5"]
    with serving(folder, ROOT / "examples" / "app.py", *limits, "--model", "/nowhere/my_vivit") as where:
        yield where


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    programs = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
    missing = [name for name, path in programs.items() if path is None]
    if missing:
        pytest.fail(
            f"The page is tried in a browser, and there is no {' and no '.join(missing)} here. On Debian: "
            "apt-get install chromium chromium-driver."
        )
    options = webdriver.ChromeOptions()
    options.binary_location = programs["chromium"]
    for flag in (*FLAGS, OFFLINE, f"--user-data-dir={tmp_path_factory.mktemp('chromium')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(programs["chromedriver"]))
    yield driver
    driver.quit()


class Page:
    """What a visitor does and sees."""

    def __init__(self, driver, address):
        self.driver = driver
        driver.get(address)
        self.until(lambda: self.all("#classify"))

    def all(self, selector):
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector):
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def until(self, found, what="what was expected"):
        try:
            return WebDriverWait(self.driver, TIMEOUT, 0.1).until(lambda _: found())
        except TimeoutException:
            pytest.fail(f"There is no {what}; the page reads: {self.one('body').text}")

    def upload(self, path):
        self.until(lambda: self.all("#video input[type=file]"))[0].send_keys(str(path))
        # The player gets the address of the file when the server has it.
        self.until(lambda: self.all("#video video[src]"), "player")

    def choose_model(self, name):
        self.one("#model input").send_keys(Keys.CONTROL, "a")
        self.one("#model input").send_keys(name, Keys.ENTER)

    def classify(self, named):
        """Presses the button; the status, when it names what it is about and is not that something is going on."""
        self.one("#classify").click()

        def finished():
            found = self.all("#status .done, #status .error")
            return [one.text for one in found if named in one.text]

        (text,) = self.until(finished, f"message about {named}")
        return text, bool(self.all("#status .error"))

    def read(self, selector, pattern):
        """All that matches in a part of the page, once there is any: each part is drawn on its own, in any order."""
        return self.until(lambda: re.findall(pattern, self.one(selector).text), f"{pattern!r} in {selector}")

    def labels(self):
        return self.read("#labels", r"(\w+)\n(\d+)%")


@pytest.fixture
def page(browser, address):
    return Page(browser, address)


def write_clip(path, motion, num_frames=24, seed=0):
    scene = Scene.draw(np.random.default_rng([77, seed]), num_frames, height=80, width=96)
    write_video(path, scene.render(motion, num_frames))
    return path


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
    assert not is_error and "shape.mp4: 2.0 seconds, 24 frames of 96 x 80" in text and "4 clips" in text

    labels = page.labels()
    assert labels[0][0] == "up_left" and int(labels[0][1]) > 60
    assert {name for name, _ in labels} == set(MOTIONS)
    assert page.read("#timeline", r"start \(s\)\nend \(s\)\nlabel\nscore\n0\.00\n.*\nup_left\n")
    assert page.read("#bar", r"\A0 s\n") and page.all("#bar .track span")
    for name in ("overlay", "sheet"):
        picture = page.until(lambda name=name: page.all(f"#{name} img"), name)[0]
        page.until(lambda picture=picture: picture.get_property("complete"))
        assert picture.get_property("naturalWidth") > 200 and picture.is_displayed()

    screenshot = tmp_path / "page.png"
    page.driver.save_screenshot(str(screenshot))
    assert len(Image.open(screenshot).convert("RGB").getcolors(1 << 24)) > 1000  # not an empty page
    wide = page.driver.execute_script("return document.documentElement.scrollWidth - window.innerWidth")
    assert wide <= 0
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
    assert not page.all("#overlay img") and not page.all("#timeline")


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


def test_the_folder_and_the_package_are_a_space_as_they_stand(tmp_path):
    """Laid out as the two uploads of its README.md lay it out; the package beside app.py is the one that is used."""
    space = tmp_path / "space"
    shutil.copytree(SPACE, space)
    shutil.copytree(ROOT / "src" / "vivit_hf", space / "vivit_hf", ignore=shutil.ignore_patterns("__pycache__"))
    with open(space / "vivit_hf" / "__init__.py", "a") as file:
        file.write("print('the package of the Space')\n")
    with serving(space, "app.py") as where:
        client = Client(where, verbose=False, download_files=tmp_path)
        status, labels, *_, overlay, sheet = client.predict(
            handle_file(space / "clips" / "down_right.mp4"), DEMO, "attention rollout", api_name="/classify"
        )
    assert "the package of the Space" in (space / "log.txt").read_text()
    assert "down_right.mp4: 2.0 seconds" in status and labels["label"] == "down_right"
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


@pytest.fixture
def jobs(monkeypatch):
    monkeypatch.syspath_prepend(str(SPACE))
    return importlib.import_module("jobs")


def make_job(jobs, folder, path, **fields):
    default = {"model": DEMO, "method": "gradient", "max_seconds": 60, "max_megabytes": 10}
    return jobs.Job(path=str(path), folder=str(folder), **{**default, **fields})


def test_a_job_that_takes_too_long_ends_with_its_process_and_the_next_is_answered(jobs, tmp_path):
    worker = jobs.Worker(seconds=0.2)
    job = make_job(jobs, tmp_path, SPACE / "clips" / "up_left.mp4")
    (part,) = worker.run(job)
    assert part["error"].startswith("This took longer than 0.2 seconds and was stopped") and worker._process is None
    worker.seconds = TIMEOUT
    parts = list(worker.run(job))
    assert parts[-1] == {"end": True} and any("labels" in part for part in parts)
    process = worker._process
    (*_, last) = worker.run(make_job(jobs, tmp_path, SPACE / "README.md"))
    assert last["error"].startswith("Cannot read README.md") and worker._process is process
    process.kill()
    process.join()
    assert list(worker.run(job))[-1] == {"end": True}
    worker.stop()


def test_the_clip_that_decided_is_the_one_that_is_explained(jobs, tmp_path):
    """In all.mp4 the motion changes: the clip in the middle is called otherwise than the video."""
    video = demo_model_path() / "samples" / "all.mp4"
    *_, labels, _, last = jobs.answer(make_job(jobs, tmp_path, video))
    assert labels["labels"] == {"none of these": 1.0}  # no video of the training has all motions
    network, processor = jobs.load_model(DEMO)
    found = jobs.classify(network, processor, video)
    with torch.no_grad():
        scores = network(found.pixel_values).logits[0].softmax(-1)
    assert network.config.id2label[int(scores.argmax())] == found.label
    assert f"the highest score for {found.label!r}" in last["caption"] and "of 4" in last["caption"]
    assert f"its nearest label is {found.label!r}" in last["status"]
    assert "The demo model only knows shapes that move along a diagonal" in last["status"]


@pytest.fixture(scope="module")
def sample():
    return (SPACE / "clips" / "up_left.mp4").read_bytes()


UPLOADS = {
    "empty": (lambda sample: b"", "Cannot read upload.mp4: it is empty"),
    "text": (lambda sample: b"not a video " * 99, "Cannot read upload.mp4: "),
    "cut off": (lambda sample: sample[: len(sample) // 3], "Cannot read upload.mp4: .* It may be damaged"),
    "too large": (lambda sample: sample + bytes(10_000_000), "upload.mp4 is too large: it has 10.0 MB"),
}


@pytest.mark.parametrize("kind", UPLOADS)
def test_uploads_that_cannot_be_used_are_named(jobs, kind, sample, tmp_path):
    make, message = UPLOADS[kind]
    path = tmp_path / "upload.mp4"
    path.write_bytes(make(sample))
    with pytest.raises(jobs.UserError, match=message):
        next(jobs.answer(make_job(jobs, tmp_path, path)))


def test_an_upload_that_is_too_long_is_named(jobs, tmp_path):
    video = demo_model_path() / "samples" / "all.mp4"
    with pytest.raises(jobs.UserError, match="is too long: it lasts 16 seconds, and this page accepts up to 3 seconds"):
        next(jobs.answer(make_job(jobs, tmp_path, video, max_seconds=3)))


def test_an_upload_with_too_many_frames_is_named(jobs, tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "MOST_FRAMES_PER_SECOND", 1)
    with pytest.raises(jobs.UserError, match="is too long or its pictures are too large"):
        next(jobs.answer(make_job(jobs, tmp_path, SPACE / "clips" / "up_left.mp4", max_seconds=3)))


def test_a_damaged_upload_is_answered_from_what_is_left(jobs, tmp_path):
    path = write_any_video(tmp_path / "damaged.mp4", num_frames=60, options={"bf": "0"})
    damage_packet(path, 30)
    parts = list(jobs.answer(make_job(jobs, tmp_path, path)))
    assert parts[-1]["pictures"] and any("labels" in part for part in parts)


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


def test_pictures_too_large_in_all_are_refused_before_they_are_decoded(jobs, tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "MOST_PIXELS", 24 * 80 * 96 - 1)
    with pytest.raises(jobs.UserError, match="24 frames of 96 x 80 are more than"):
        jobs.check_clip(str(SPACE / "clips" / "up_left.mp4"), 60, 10)


def test_the_page_runs_the_exact_model_and_says_so(jobs, tmp_path):
    for cls in (ViViTForVideoClassification, ViViTVideoProcessor):
        cls.from_pretrained(demo_model_path()).save_pretrained(tmp_path)
    clip = SPACE / "clips" / "up_left.mp4"
    *_, before = jobs.answer(make_job(jobs, tmp_path, clip, model=str(tmp_path)))
    tune_folder(tmp_path, merge_tokens=1)
    jobs.load_model.cache_clear()
    *_, last = jobs.answer(make_job(jobs, tmp_path, clip, model=str(tmp_path)))
    assert last["status"] == f"{before['status']} {jobs.EXACT_NOTE}" and last["caption"] == before["caption"]


def test_models_that_would_stall_the_page_or_have_no_answer_are_named(jobs, tmp_path):
    model, processor = (
        cls.from_pretrained(demo_model_path()) for cls in (ViViTForVideoClassification, ViViTVideoProcessor)
    )
    for name in ("fast", "nan"):
        processor.frames_per_second = 3e7 if name == "fast" else None
        if name == "nan":
            torch.nn.init.constant_(model.classifier.weight, float("nan"))
        model.save_pretrained(tmp_path / name)
        processor.save_pretrained(tmp_path / name)
    clip = SPACE / "clips" / "up_left.mp4"
    for name, message in (
        ("fast", "Cannot load the model .* `frames_per_second=30000000.0` .* at most 1000"),
        ("nan", "NaN or infinite"),
    ):
        with pytest.raises((jobs.UserError, NonFiniteError), match=message):
            list(jobs.answer(make_job(jobs, tmp_path, clip, model=str(tmp_path / name))))


def test_a_name_is_text_whatever_is_in_it():
    app = runpy.run_path(str(SPACE / "app.py"))
    assert "<script>" not in app["box"]("<script>alert(1)</script>")
    segment = app["Segment"](0.0, 1.0, '"><script>', 0.5)
    assert "<script>" not in app["timeline_bar"]([segment])
