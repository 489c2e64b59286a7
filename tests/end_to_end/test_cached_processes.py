"""Training from stored tokens that is killed while it stores them, and on several processes."""

import signal
import sys

import pytest
import torch
from finetune_runs import EXAMPLES, losses, settings_for, start, to_argv, write_data
from labelled_videos import TORCHRUN
from paths import TESTS
from safetensors.torch import load_file


pytestmark = pytest.mark.slow

CACHED = {"freeze": "spatial", "cache_features": True, "num_temporal_layers": 1, "temporal_pooling": "mean"}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = write_data(tmp_path_factory.mktemp("data"))
    (folder / "videos" / "train" / "up_left" / "001.mp4").write_bytes(b"broken")
    return folder


def test_two_processes_share_the_cache_unevenly_and_train_like_one(data, tmp_path):
    plain = {**CACHED, "num_cached_views": 3, "max_steps": 3, "lr_scheduler_type": "constant", "optim": "sgd"}
    plain |= {"learning_rate": 0.1, "max_train_samples": 13}  # 39 views: 20 and 19; 3 whole batches
    one = settings_for(data, tmp_path / "one", **plain)
    two = settings_for(data, tmp_path / "two", per_device_train_batch_size=2, ddp_backend="gloo", **plain)
    printed = []
    for command, settings in (([sys.executable], one), (TORCHRUN, two)):
        process = start([*command, EXAMPLES / "finetune.py", *to_argv(settings)])
        assert process.returncode == 0, process.stderr[-3000:]
        printed.append(process.stdout)
    assert "Training on 2 process(es)" in printed[1]
    assert all("tokens of 43 views, 43 of them computed now" in text for text in printed)
    names, others = (
        {path.relative_to(folder / "feature_cache") for path in (folder / "feature_cache").rglob("*") if path.is_file()}
        for folder in (tmp_path / "one", tmp_path / "two")
    )
    assert names == others and not any("unfinished" in str(name) for name in names)
    for name in names:
        if name.suffix == ".safetensors":
            ours, theirs = (load_file(tmp_path / run / "feature_cache" / name)["steps"] for run in ("one", "two"))
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=2e-4)
    ours, expected = (load_file(tmp_path / name / "model.safetensors") for name in ("two", "one"))
    for name, tensor in expected.items():
        torch.testing.assert_close(ours[name], tensor, atol=2e-6, rtol=1e-4, msg=name)


def test_a_run_killed_while_it_stores_tokens_goes_on_with_those_that_are_whole(data, tmp_path):
    settings = settings_for(data, tmp_path / "whole", **CACHED)
    process = start([sys.executable, EXAMPLES / "finetune.py", *to_argv(settings)])
    assert process.returncode == 0, process.stderr[-3000:]
    settings["output_dir"] = tmp_path / "killed"
    process = start([sys.executable, TESTS / "killed_finetune.py", "tokens:8", *to_argv(settings)])
    assert process.returncode == -signal.SIGKILL, process.stderr[-3000:]
    cache = tmp_path / "killed" / "feature_cache"
    assert len(list(cache.rglob("*.safetensors"))) == 7 and len(list(cache.rglob(".*.unfinished"))) == 1
    process = start([sys.executable, EXAMPLES / "finetune.py", *to_argv(settings)])
    assert process.returncode == 0, process.stderr[-3000:]
    assert "tokens of 20 views, 13 of them computed now" in process.stdout
    assert not list(cache.rglob(".*.unfinished")) and losses(tmp_path / "killed") == losses(tmp_path / "whole")
