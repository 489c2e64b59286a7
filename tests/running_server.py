"""Runs `vivit-hf serve` as a process, for tests."""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
import psutil


class RunningServer:
    """The command with `arguments` and a free port; a context manager that ends it with SIGTERM and checks how."""

    def __init__(self, *arguments):
        self._folder = tempfile.TemporaryDirectory()
        self.uploads = Path(self._folder.name, "uploads")  # the server's folder for temporary files
        self.uploads.mkdir()
        self._log = Path(self._folder.name, "log")
        with self._log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "vivit_hf", "serve", "--port", "0", *map(str, arguments)],
                stdout=log,
                stderr=log,
                env={**os.environ, "TMPDIR": str(self.uploads)},
            )

    def __enter__(self):
        try:
            self._wait_until_ready()
        except BaseException:
            self.process.kill()
            raise
        return self

    @contextlib.contextmanager
    def killed(self):
        """Start the server, and kill it in the end."""
        try:
            self._wait_until_ready()
            yield self
        finally:
            self.process.kill()
            self.process.wait()
            left = self.named_uploads()
            self._folder.cleanup()
            assert not left

    def _wait_until_ready(self):
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and self.process.poll() is None:
            if found := re.search(r"(http://127.0.0.1:(\d+))/classify", self.log):
                self.address, self.port = found[1], int(found[2])
                with contextlib.suppress(httpx.TransportError):
                    if httpx.get(f"{self.address}/health/ready", timeout=5).status_code == 200:
                        self.client = httpx.Client(base_url=self.address, timeout=60, trust_env=False)
                        return
            time.sleep(0.1)
        raise AssertionError(f"the server did not start:\n{self.log}")

    def __exit__(self, kind, *_):
        self.client.close()
        self.process.send_signal(signal.SIGTERM)
        try:
            code = self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
        log, left = self.log, self.named_uploads()
        self._folder.cleanup()
        if kind is None:
            assert code == 0 and not left and "Traceback" not in log, f"{code}, {left}\n{log}"

    @property
    def log(self):
        return self._log.read_text()

    def send(self, data, name="video.mp4", **options):
        """Upload bytes, or the content of a path, whose name is then sent too."""
        if isinstance(data, Path):
            data, name = data.read_bytes(), data.name
        return self.client.post("/classify", files={"video": (name, data)}, **options)

    def ask(self, address, **options):
        return self.client.post("/classify", json={"url": address}, **options)

    def metric(self, name):
        """The value of a metric; labels as in Prometheus' format, such as `requests_total{status="200"}`."""
        lines = self.client.get("/metrics").text.splitlines()
        return next((float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"{name} ")), 0.0)

    def wait_for(self, name, value, seconds=20):
        """Wait until a metric has a value."""
        deadline = time.monotonic() + seconds
        while (found := self.metric(name)) != value:
            assert time.monotonic() < deadline, f"{name} is {found}, not {value}"
            time.sleep(0.05)

    def megabytes(self):
        return psutil.Process(self.process.pid).memory_info().rss / 1e6

    def named_uploads(self):
        """The files in the folder for temporary files, where torch makes an empty folder."""
        return [path for path in self.uploads.rglob("*") if not path.is_dir()]

    def open_uploads(self):
        """The files of uploads that the process has open: they have no name any more."""
        folder = Path(f"/proc/{self.process.pid}/fd")
        targets = []
        for link in folder.iterdir():
            with contextlib.suppress(OSError):
                targets.append(os.readlink(link))
        return [target for target in targets if target.startswith(str(self.uploads))]


def error_of(response, status):
    """The message of a refusal, checked to be JSON without paths or traces of the server."""
    assert response.status_code == status, response.text
    body = json.loads(response.text)
    assert set(body) <= {"file", "error"} and body["error"]
    assert not re.search(r"Traceback|/tmp/|/work/|\.py\b|site-packages", response.text), response.text
    return body["error"]
