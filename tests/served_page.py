"""The page of examples/app.py, served by a process of its own, and a headless browser that is offline."""

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request

import numpy as np
import pytest
from moving_shapes import Scene, write_video
from paths import ROOT
from selenium import webdriver
from selenium.common.exceptions import TimeoutException
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait


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
    settings = {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
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


@contextlib.contextmanager
def open_browser(folder):
    programs = {name: shutil.which(name) for name in ("chromium", "chromedriver")}
    missing = [name for name, path in programs.items() if path is None]
    if missing:
        pytest.fail(
            f"The page is tried in a browser, and there is no {' and no '.join(missing)} here. On Debian: "
            "apt-get install chromium chromium-driver."
        )
    options = webdriver.ChromeOptions()
    options.binary_location = programs["chromium"]
    for flag in (*FLAGS, OFFLINE, f"--user-data-dir={folder}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(programs["chromedriver"]))
    try:
        yield driver
    finally:
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

    def choose_model(self, name, place="#model"):
        (field,) = self.until(lambda: self.all(f"{place} input"), place)
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys(name, Keys.ENTER)

    def open_tab(self, name):
        def tabs():
            return [one for one in self.all("button[role=tab]") if one.text == name and one.is_displayed()]

        self.until(tabs, f"tab {name}")[0].click()

    def classify(self, named):
        return self.press("#classify", "#status", named)

    def press(self, button, status, named):
        """Presses a button; the status, when it names what it is about and is not that something is going on."""
        self.until(lambda: self.all(button), button)[0].click()

        def finished():
            found = self.all(f"{status} .done, {status} .error")
            texts = [one.text for one in found]  # Gradio may change the text before the class
            return [text for text in texts if named in text and not text.endswith("...")]

        (text,) = self.until(finished, f"message about {named}")
        return text, bool(self.all(f"{status} .error"))

    def overflow(self):
        """The pixels by which the page is wider than the window."""
        return self.driver.execute_script("return document.documentElement.scrollWidth - window.innerWidth")

    def read(self, selector, pattern):
        """All that matches in a part of the page, once there is any: each part is drawn on its own, in any order."""
        return self.until(lambda: re.findall(pattern, self.one(selector).text), f"{pattern!r} in {selector}")

    def labels(self):
        return self.read("#labels", r"(\w+)\n(\d+)%")


def write_clip(path, motion, num_frames=24, seed=0):
    scene = Scene.draw(np.random.default_rng([77, seed]), num_frames, height=80, width=96)
    write_video(path, scene.render(motion, num_frames))
    return path
