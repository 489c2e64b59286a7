"""Files of folders and of the Hub are found; missing files are told from files that cannot be reached."""

import json
import os
import subprocess
import sys

import pytest
from hub_server import HubServer

from vivit_hf.initialisation.weight_files import find_file


PROGRAM = """
import json, sys
from vivit_hf.initialisation.weight_files import find_file

found = {}
for place in sys.argv[1:]:
    owner, repository, name = place.split("/")
    try:
        path = find_file(f"{owner}/{repository}", name)
        found[place] = path and path.read_text()
    except OSError as error:
        found[place] = str(error)
print(json.dumps(found))
"""
SETTINGS = "tester/vit/preprocessor_config.json"


def find(places, environment):
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", **environment}
    command = [sys.executable, "-c", PROGRAM, *places]
    process = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment)
    assert process.returncode == 0, process.stderr[-3000:]
    return json.loads(process.stdout)


def test_missing_files_of_the_hub_differ_from_unreachable_ones(tmp_path):
    with HubServer() as hub:
        hub.create_repository("tester/vit", {"config.json": b"{}", "preprocessor_config.json": b'{"size": 8}'})
        environment = hub.environment(tmp_path, "hf_reader")
        found = find(["tester/vit/config.json", "tester/vit/none.json", "tester/nothing/config.json"], environment)
    assert found["tester/vit/config.json"] == "{}" and found["tester/vit/none.json"] is None
    assert "there is no folder 'tester/nothing', and the Hub has no public model of that name" in found.pop(
        "tester/nothing/config.json"
    )
    # The server is gone; its answers are in the cache, but nobody has asked for the processor before.
    later = find([*found, SETTINGS], environment)
    assert {name: later[name] for name in found} == found
    assert f"the Hub cannot be asked for {SETTINGS}" in later[SETTINGS]
    assert find([SETTINGS], {**environment, "HF_HUB_OFFLINE": "1"}) == {SETTINGS: None}


@pytest.mark.parametrize("source", ["my_vivit", "/nowhere/at/all", "./my_vivit", "a/b/c"])
def test_a_source_that_cannot_be_a_hub_id_is_a_missing_folder(source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError, match=f"there is no folder '{source}', and .* like 'owner/name'"):
        find_file(source, "config.json")


def test_files_of_folders_are_found(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert find_file(str(tmp_path), "config.json") == tmp_path / "config.json"
    assert find_file(str(tmp_path), "model.safetensors") is None
