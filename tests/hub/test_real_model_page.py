"""
The commands of docs/real_model.md run as they stand, against a Hub and data sets of the same names, files and folders.

The models have the classes of the real ones and small random weights, and the videos are a second long. `vivit-hf`
only gets sizes beside the arguments on the page (`STAND_IN`), and `curl` takes the file from the server on loopback.
"""

import csv
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hub_server import HubServer
from paths import FIXTURES, ROOT
from transformers import VivitConfig, VivitForVideoClassification
from video_files import write_video
from vit_models import make_dinov2, make_vit, write_layout

from vivit_hf.conversion.scenic_releases import RELEASES


pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]  # up to six commands one after the other, on a busy machine


PAGE = (ROOT / "docs" / "real_model.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"<!-- needs: (.+?) -->\n```bash\n(.*?)```", PAGE, flags=re.DOTALL)
SPORTS = ["ApplyEyeMakeup", "Archery", "BabyCrawling"]
TEMPLATES = ["Pushing [something] from left to right", "Turning [something] upside down"]
KINETICS = ["abseiling", "air drumming"]
RELEASE = "vivit-b-16x2-fe-kinetics400"

# The command, with a released model of the size of the golden checkpoint, and short runs of small clips.
STAND_IN = """#!{python}
import json, sys
from dataclasses import replace
from vivit_hf.cli.app import main
from vivit_hf.conversion.scenic_releases import RELEASES

official = RELEASES["{release}"]
small = dict(model_config=json.loads({model!r}), num_frames=8, image_size=24, num_labels=7)
RELEASES["{release}"] = replace(official, **small)
if __name__ == "__main__":
    if sys.argv[1] == "finetune":
        sys.argv += "--use_cpu --num_train_epochs 1 --num_clips 1 --num_crops 1 --dataloader_num_workers 0".split()
        if "vit_b" not in sys.argv:
            sys.argv += "--num_frames 4 --image_size 56".split()
    main()
"""
CURL = """#!{python}
import sys, urllib.parse, urllib.request
option, output_option, output, address = sys.argv[1:]
assert (option, output_option) == ("-L", "-o"), sys.argv
address = "{endpoint}/scenic/bucket/resolve/main" + urllib.parse.urlsplit(address).path
urllib.request.urlretrieve(address, output)
"""


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A Hub with what the page names, and the official checkpoint under its path in the bucket."""
    folder = tmp_path_factory.mktemp("hub")
    means = {"do_resize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    for name in ("google/vit-base-patch16-224-in21k", "google/vit-large-patch16-224-in21k"):
        write_layout(make_vit(), folder / name, "names in files")
        settings = {"image_processor_type": "ViTImageProcessor", "size": {"height": 24, "width": 24}, **means}
        (folder / name / "preprocessor_config.json").write_text(json.dumps(settings))
    make_dinov2(image_size=28, patch_size=14).save_pretrained(folder / "facebook/dinov2-small")
    settings = {"image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 256}, "resample": 3, **means}
    settings |= {"do_center_crop": True, "crop_size": {"height": 224, "width": 224}}
    (folder / "facebook/dinov2-small/preprocessor_config.json").write_text(json.dumps(settings))
    sizes = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 40}
    labels = {"id2label": dict(enumerate([*KINETICS, "zumba"]))}
    config = VivitConfig(**sizes, image_size=24, num_frames=4, tubelet_size=[2, 8, 8], **labels)
    VivitForVideoClassification(config).save_pretrained(folder / "google/vivit-b-16x2-kinetics400")
    settings = {"image_processor_type": "VivitImageProcessor", "size": {"shortest_edge": 28}, "offset": True, **means}
    settings |= {"crop_size": {"height": 24, "width": 24}}
    (folder / "google/vivit-b-16x2-kinetics400/preprocessor_config.json").write_text(json.dumps(settings))
    names = {str(index): f"motion {index}" for index in range(7)}
    checkpoint = (FIXTURES / "scenic" / "ckpt_03_old_optimizer_target.msgpack").read_bytes()
    with HubServer() as server:
        for path in sorted(folder.glob("*/*")):
            server.create_repository(str(path.relative_to(folder)), files_of(path))
        labels = {"kinetics400-id2label.json": json.dumps(names).encode()}
        server.create_repository("huggingface/label-files", labels)
        server.create_repository("sayakpaul/ucf101-subset", {"UCF101_subset.tar.gz": ucf101_archive(folder)})
        address = "scenic-bucket/vivit/kinetics_400/vivit_base_16x2_fe/checkpoint"
        server.create_repository("scenic/bucket", {address: checkpoint})
        yield server


def write_class_folders(folder, splits, names, ending):
    for split, count in splits.items():
        for name in names:
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                write_video(folder / split / name / f"v_{name}_g{number:02d}_c01{ending}", num_frames=8)


def ucf101_archive(folder):
    write_class_folders(folder / "UCF101_subset", {"train": 3, "val": 1, "test": 1}, SPORTS, ".avi")
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as file:
        file.add(folder / "UCF101_subset", "UCF101_subset")
    return archive.getvalue()


def write_own_videos(folder):
    write_class_folders(folder / "videos", {"train": 3, "val": 1}, ["pour", "stir"], ".mp4")


def write_something_something(folder):
    """The videos in an archive cut into two parts, and annotation files with the fields of the real ones."""
    videos = folder / "20bn-something-something-v2"
    videos.mkdir()
    (folder / "labels").mkdir()
    number = 78687
    for split, count in {"train": 3, "validation": 1}.items():
        rows = []
        for template in TEMPLATES * count:
            number += 1
            write_video(videos / f"{number}.webm", num_frames=8, codec="libvpx-vp9", options={"deadline": "realtime"})
            label = template.replace("[something]", "a cup")
            rows.append({"id": str(number), "label": label, "template": template, "placeholders": ["a cup"]})
        (folder / "labels" / f"{split}.json").write_text(json.dumps(rows))
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:gz") as file:
        file.add(videos, videos.name)
    shutil.rmtree(videos)
    content = archive.getvalue()
    for part, chunk in enumerate((content[:1000], content[1000:])):
        (folder / f"20bn-something-something-v2-{part:02d}").write_bytes(chunk)


def write_kinetics(folder):
    """Clips by YouTube id and seconds in folders of splits; one of the training clips is lost."""
    (folder / "annotations").mkdir()
    for split, count in {"train": 4, "val": 1}.items():
        (folder / "k400" / split).mkdir(parents=True)
        with open(folder / "annotations" / f"{split}.csv", "w", newline="") as file:
            table = csv.writer(file)
            table.writerow(["label", "youtube_id", "time_start", "time_end", "split"])
            for index, label in enumerate(KINETICS * count):
                name = f"{split}-_{index:04d}XYZ"[:11]
                table.writerow([label, name, 10, 20, {"val": "validate"}.get(split, split)])
                if (split, index) != ("train", 0):
                    write_video(folder / "k400" / split / f"{name}_000010_000020.mp4", num_frames=8)


def run_blocks(group, folder, hub):
    """Run the commands of a group of blocks in a shell that stops at the first error; return what they print."""
    programs = folder / "bin"
    programs.mkdir()
    with np.load(FIXTURES / "scenic" / "03_fe_token.npz") as case:
        model = json.dumps(json.loads(str(case["config"]))["model"])
    (programs / "vivit-hf").write_text(STAND_IN.format(python=sys.executable, release=RELEASE, model=model))
    (programs / "curl").write_text(CURL.format(python=sys.executable, endpoint=hub.endpoint))
    hub_command = "from huggingface_hub.cli.hf import main; main()"
    (programs / "hf").write_text(f"#!{sys.executable}\n{hub_command}\n")
    for program in programs.iterdir():
        program.chmod(0o755)
    environment = {**os.environ, **hub.environment(folder / "home")}
    environment["PATH"] = f"{programs}{os.pathsep}{environment['PATH']}"
    commands = "\n".join(text for name, text in BLOCKS if name == group)
    process = subprocess.run(
        ["bash", "-e", "-c", commands], cwd=folder, env=environment, capture_output=True, text=True, timeout=580
    )
    assert process.returncode == 0, process.stderr[-4000:]
    return process.stdout


def labels_of(folder):
    return sorted(json.loads((folder / "config.json").read_text())["label2id"])


def test_an_image_model_learns_own_videos(tmp_path, hub):
    write_own_videos(tmp_path)
    write_video(tmp_path / "new.mp4", num_frames=8)
    printed = run_blocks("the Hub and your own videos", tmp_path, hub)
    assert labels_of(tmp_path / "my_vivit") == ["pour", "stir"]
    assert "new.mp4" in printed
    asked = {path for method, path, status, _ in hub.requests if status == 200}
    assert any(path.startswith("/facebook/dinov2-small/") for path in asked)


def test_image_models_are_converted_and_trained(tmp_path, hub):
    write_own_videos(tmp_path)
    printed = run_blocks("the Hub", tmp_path, hub)
    assert len(re.findall(r"max\s+abs\s+difference", printed.replace("│", " "))) == 2
    assert "factorised_encoder" in (tmp_path / "vit_b" / "config.json").read_text()
    assert "spatio_temporal (Model 1 of the paper)" in printed and "16 frames of 224 x 224 pixels" in printed
    assert labels_of(tmp_path / "all_weights") == ["pour", "stir"]


def test_ucf101_subset_is_unpacked_learnt_and_scored(tmp_path, hub):
    run_blocks("the Hub (UCF101)", tmp_path, hub)
    assert labels_of(tmp_path / "ucf101_vivit") == SPORTS
    scores = [path.read_text() for path in (tmp_path / "ucf101_scores").glob("*.json")]
    assert scores and any("top1" in text for text in scores)


def test_something_something_is_read_as_published(tmp_path, hub):
    write_something_something(tmp_path)
    printed = run_blocks("Something-Something v2", tmp_path, hub)
    assert "6 videos to train on, 2 for validation, 2 classes" in printed
    assert labels_of(tmp_path / "ssv2_vivit") == sorted(one.replace("[", "").replace("]", "") for one in TEMPLATES)


def test_kinetics_is_read_as_published_without_what_is_lost(tmp_path, hub):
    write_kinetics(tmp_path)
    printed = run_blocks("Kinetics", tmp_path, hub)
    assert "7 videos to train on, 2 for validation, 2 classes" in printed
    assert labels_of(tmp_path / "k400_vivit") == KINETICS


def test_official_models_are_converted_and_classify(tmp_path, hub):
    write_video(tmp_path / "new.mp4", num_frames=8)
    printed = run_blocks("official models", tmp_path, hub)
    assert labels_of(tmp_path / "vivit_b_fe_k400") == [f"motion {index}" for index in range(7)]
    assert "motion " in printed and "zumba" in printed, "the answers of both models"
    assert labels_of(tmp_path / "vivit_b_k400") == sorted([*KINETICS, "zumba"])


def test_the_page_names_every_official_model():
    assert re.findall(r"^\| `(vivit-\S+)` \|", PAGE, flags=re.MULTILINE) == list(RELEASES)


def test_every_command_of_the_page_is_tried():
    assert PAGE.count("```bash") == len(BLOCKS) + 1, "all but the installation"
    source = Path(__file__).read_text(encoding="utf-8")
    assert all(f'run_blocks("{name}", ' in source for name, _ in BLOCKS)
