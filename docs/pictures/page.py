"""Take screenshots of the page of examples/app.py in a browser, wide and as on a phone, with a clip classified.

Needs chromium and chromium-driver, and selenium (`pip install '.[app,test]'`).
"""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

from PIL import Image
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import WebDriverWait

from vivit_hf import demo_model_path


ROOT = Path(__file__).resolve().parents[2]
SIZES = {"page_wide": (1280, False), "page_phone": (390, True)}  # width in pixels, and whether it is a phone
TIMEOUT = 240  # seconds
FLAGS = "--headless=new --no-sandbox --disable-gpu --no-first-run --hide-scrollbars --window-size=1280,1400".split()
OFFLINE = "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1"


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """Serve the page for the time of a block, and give its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "GRADIO_TEMP_DIR": str(folder)}
    program = [sys.executable, str(ROOT / "examples" / "app.py"), "--host", "127.0.0.1", "--port", str(port)]
    process = subprocess.Popen(program, env=environment, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + TIMEOUT
        while True:
            try:
                urllib.request.urlopen(f"{address}/config", timeout=5).close()
                break
            except OSError as error:
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError("examples/app.py does not serve its page") from error
                time.sleep(0.2)
        yield address
    finally:
        process.terminate()
        process.wait(20)


@contextmanager
def browser(folder: Path) -> Iterator[Any]:
    """Give a headless browser that is offline."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for flag in (*FLAGS, OFFLINE, f"--user-data-dir={folder}"):
        options.add_argument(flag)
    driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        yield driver
    finally:
        driver.quit()


def screenshot(driver: Any, address: str, video: Path, width: int, is_phone: bool) -> Image.Image:
    """Classify a video on the page, and return a picture of the whole page, (width) pixels wide."""
    metrics = {"width": width, "height": 844 if is_phone else 1000, "deviceScaleFactor": 1, "mobile": is_phone}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    driver.get(address)

    def until(selector: str) -> Any:
        return WebDriverWait(driver, TIMEOUT, 0.2).until(lambda one: one.find_elements(By.CSS_SELECTOR, selector))[0]

    until("#classify")
    until("#video input[type=file]").send_keys(str(video))
    until("#video video[src]")
    until("#classify").click()
    until("#overlay img, #overlay video")
    until("#status .done")
    time.sleep(2)  # pictures fade in
    height = driver.execute_script("return document.documentElement.scrollHeight")
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {**metrics, "height": height})
    time.sleep(1)
    return Image.open(BytesIO(driver.get_screenshot_as_png())).convert("RGB")


def main(folder: Path) -> list[Path]:
    """Write page_wide.png and page_phone.png to the folder."""
    paths = []
    with tempfile.TemporaryDirectory() as temporary, served(Path(temporary, "gradio")) as address:
        video = Path(shutil.copy(demo_model_path() / "samples" / "up_left.mp4", Path(temporary, "my_video.mp4")))
        for name, (width, is_phone) in SIZES.items():
            with browser(Path(temporary, name)) as driver:
                picture = screenshot(driver, address, video, width, is_phone)
            paths.append(folder / f"{name}.png")
            picture.quantize(256).save(paths[-1], optimize=True)
    return paths
