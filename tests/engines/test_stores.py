"""
`classify-dataset` and `embed` on two nodes, into stores on loopback that speak S3, Google Cloud Storage and the Hub.

`make test-engines` runs this.
"""

import os
import re
import signal
import socket
import subprocess
import sys

import numpy as np
import pytest
from engine_data import arguments, check_rows
from hub_server import HubServer

from vivit_hf.data.remote_files import file_names, location_of
from vivit_hf.inference import read_features


pytestmark = [pytest.mark.engines, pytest.mark.slow]

# Runs the command, and kills its process when it would upload its second shard, if it is the second process.
KILLED = """
import os, signal, sys
from vivit_hf.data import remote_files
from vivit_hf.cli.app import main

put, left = remote_files.RemotePath.written_whole, 1

def upload(self):
    global left
    if os.environ["RANK"] == "1" and self.name.startswith("part-"):
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
    return put(self)

remote_files.RemotePath.written_whole = upload
main(sys.argv[1:])
"""


def free_port():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def moto_server():
    """The address of a server of S3."""
    moto = pytest.importorskip("moto.server", reason="make test-engines installs it")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    yield "http://{}:{}".format(*server.get_host_and_port())
    server.stop()


@pytest.fixture
def s3(moto_server, monkeypatch, tmp_path):
    """A new bucket."""
    settings = {"AWS_ACCESS_KEY_ID": "me", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_DEFAULT_REGION": "us-east-1"}
    for name, value in {**settings, "AWS_ENDPOINT_URL": moto_server}.items():
        monkeypatch.setenv(name, value)
    bucket = re.sub("[^a-z0-9]+", "-", tmp_path.name.lower()).strip("-")
    location_of(f"s3://{bucket}").filesystem.mkdir(bucket)
    return f"s3://{bucket}"


@pytest.fixture
def gs(monkeypatch):
    emulator = pytest.importorskip("gcp_storage_emulator.server", reason="make test-engines installs it")
    port = free_port()
    server = emulator.create_server("127.0.0.1", port, in_memory=True, default_bucket="labels")
    server.start()
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
    yield "gs://labels"
    server.stop()


@pytest.fixture
def hf(tmp_path):
    with HubServer() as hub:
        hub.create_repository("tester/labels", {"README.md": b""})
        yield hub, hub.environment(tmp_path / "home", token="hf_writer")


def nodes(launcher, *command):
    """Run a command on two nodes, with one process each, and return the processes when both have ended."""
    port = free_port()
    launchers = {
        "torchrun": "torch.distributed.run --nnodes 2 --node_rank {} --nproc_per_node 1 --master_addr 127.0.0.1 "
        "--master_port {}",
        "accelerate": "accelerate.commands.launch --multi_gpu --num_machines 2 --num_processes 2 --machine_rank {} "
        "--main_process_ip 127.0.0.1 --main_process_port {} --mixed_precision no --dynamo_backend no",
    }
    begin = [
        [sys.executable, "-m", *launchers[launcher].format(rank, port).split(), *map(str, command)] for rank in (0, 1)
    ]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    started = [subprocess.Popen(one, start_new_session=True, **pipes) for one in begin]
    try:
        outputs = [one.communicate(timeout=150) for one in started]
    finally:
        for one in started:
            if one.poll() is None:
                os.killpg(one.pid, signal.SIGKILL)
    return [(one.returncode, "".join(output)) for one, output in zip(started, outputs, strict=True)]


def rows(address):
    import pyarrow.parquet

    folder = location_of(address)
    names = sorted(name for name in file_names(folder) if name.startswith("part-"))
    return [row for name in names for row in pyarrow.parquet.read_table((folder / name).open("rb")).to_pylist()]


def changes_of(address, names):
    """When these objects were written."""
    folder = location_of(address)
    folder.filesystem.invalidate_cache()
    return {name: folder.filesystem.info((folder / name).path)["LastModified"] for name in names}


@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_two_nodes_share_the_shards_in_s3(s3, data, one_process, launcher):
    command = ("-m", "vivit_hf", "classify-dataset", *arguments(data, f"{s3}/run"))
    ended = nodes(launcher, *command)
    assert [code for code, _ in ended] == [0, 0], ended
    wrote = [[line.split(":")[0] for line in output.splitlines() if line.startswith("part-")] for _, output in ended]
    assert wrote == [[f"part-0000{index}.parquet" for index in part] for part in ((0, 2, 4), (1, 3, 5))]
    check_rows(rows(f"{s3}/run"), one_process)


def test_a_killed_worker_costs_its_shard_and_no_row_appears_twice(s3, data, one_process, run_python, tmp_path):
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    ended = nodes("torchrun", script, "classify-dataset", *arguments(data, f"{s3}/run"))
    assert ended[1][0] != 0 and "SIGKILL" in ended[1][1], ended
    left = file_names(location_of(f"{s3}/run"))
    assert "part-00003.parquet" not in left and "part-00001.parquet" in left
    before = changes_of(f"{s3}/run", left)

    # On one node, with processes that decode, which are forked from one that has talked to the store.
    told = run_python("-m", "vivit_hf", "classify-dataset", *arguments(data, f"{s3}/run"), "--num_workers", 2)
    assert f"18 videos in 6 parts, {len(left) - 1} of them finished" in told
    assert changes_of(f"{s3}/run", left) == before
    found = rows(f"{s3}/run")
    assert [row["index"] for row in found] == list(range(18))
    check_rows(found, one_process)


def test_gs_has_the_rows_of_a_disk(gs, data, one_process, run_python):
    run_python("-m", "vivit_hf", "classify-dataset", *arguments(data, f"{gs}/run"))
    check_rows(rows(f"{gs}/run"), one_process)
    again = run_python("-m", "vivit_hf", "classify-dataset", *arguments(data, f"{gs}/run"))
    assert again == "18 videos in 6 parts, 6 of them finished\n"


def test_the_hub_has_the_rows_of_a_disk(hf, data, one_process, run_python, tmp_path):
    hub, environment = hf
    command = ("-m", "vivit_hf", "classify-dataset", *arguments(data, "hf://tester/labels/run"))
    run_python(*command, **environment)
    files = hub.repositories["tester/labels"].files
    for name, content in files.items():
        if name.endswith(".parquet"):
            (tmp_path / name.rpartition("/")[2]).write_bytes(content)
    check_rows(rows(str(tmp_path)), one_process)
    again = run_python(*command, **environment)
    assert "18 videos in 6 parts, 6 of them finished" in again
    assert len(hub.repositories["tester/labels"].commits) == 8, "the first, _run.json and six shards"


def test_two_nodes_embed_into_s3(s3, data, run_python, tmp_path):
    common = ("--model", data / "model", "--device", "cpu", "--workers", 0, "--num-clips", 2, "--num-crops", 1)
    command = ("embed", data / "list.txt", *common, "--output")
    ended = nodes("torchrun", "-m", "vivit_hf", *command, f"{s3}/features.parquet")
    assert "16 videos with a vector" in ended[0][1], ended
    code = f"import sys; from vivit_hf.cli.app import main; sys.exit(main({list(map(str, command))!r} + sys.argv[1:]))"
    alone = subprocess.run([sys.executable, "-c", code, tmp_path / "f.parquet"], capture_output=True, timeout=200)
    assert alone.returncode == 1, alone.stderr[-2000:]
    found, expected = read_features(f"{s3}/features.parquet"), read_features(tmp_path / "f.parquet")
    assert found.files == expected.files and found.settings["failed"] == expected.settings["failed"]
    np.testing.assert_allclose(found.vectors, expected.vectors, atol=1e-6)
    assert file_names(location_of(s3)) == {"features.parquet"}, "the shards are gone"


@pytest.mark.parametrize("is_there", [False, True], ids=["no bucket", "no server"])
def test_a_bucket_that_cannot_be_written_ends_the_command_before_the_work(s3, data, is_there):
    address = f"{s3}/run" if is_there else "s3://no-such-bucket/run"
    environment = {**os.environ, **({"AWS_ENDPOINT_URL": f"http://127.0.0.1:{free_port()}"} if is_there else {})}
    command = [sys.executable, "-m", "vivit_hf", "classify-dataset", *map(str, arguments(data, address))]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=200, env=environment)
    assert ended.returncode == 1 and "Traceback" not in ended.stderr
    action = "look for" if is_there else "write"
    assert f"classify-dataset: Cannot {action} {address}/_run.json: " in ended.stderr, ended.stderr
    assert "Loading weights" not in ended.stderr
