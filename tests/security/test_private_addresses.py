"""Downloads from private addresses need the permission of the caller; no file can give it."""

import json
import pickle
from functools import partial

import pytest
from tiny_models import case_config, make_model
from transformers import AutoImageProcessor, pipeline
from video_files import http_server, write_video

from vivit_hf import ViViTVideoProcessor
from vivit_hf.inference.live_video import LiveVideo
from vivit_hf.inference.prediction import predict_videos
from vivit_hf.inference.timeline import file_windows
from vivit_hf.video_sources import VideoDecodingError, VideoLimits


ALLOWED = {"allow_private_addresses": True}
SMALL = {"num_frames": 4, "size": 40, "crop_size": 32}
REFUSED = "127.0.0.1 is not a public address"


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    path = write_video(tmp_path_factory.mktemp("video") / "video.mp4", num_frames=8)
    with http_server(path.parent) as server:
        yield f"{server}/video.mp4?key=hunter2"


def test_the_caller_can_permit_them(address, tmp_path):
    processor = ViViTVideoProcessor(**SMALL)
    processor.save_pretrained(tmp_path)
    with pytest.raises(VideoDecodingError, match=REFUSED):
        processor(address)
    for permitted in (
        partial(processor, video_limits=ALLOWED),
        ViViTVideoProcessor(**SMALL, video_limits=ALLOWED),
        ViViTVideoProcessor.from_pretrained(tmp_path, video_limits=ALLOWED),
        AutoImageProcessor.from_pretrained(tmp_path, video_limits=ALLOWED),
        pickle.loads(pickle.dumps(ViViTVideoProcessor(**SMALL, video_limits=ALLOWED))),
    ):
        assert permitted(address)["pixel_values"].shape == (1, 4, 3, 32, 32)


def test_limits_that_the_caller_does_not_name_stay(address, tmp_path):
    processor = ViViTVideoProcessor(**SMALL, video_limits={"max_frames": 7})
    processor.save_pretrained(tmp_path)
    loaded = ViViTVideoProcessor.from_pretrained(tmp_path, video_limits=ALLOWED)
    assert loaded.video_limits == {"max_frames": 7, **ALLOWED}
    for permitted in (loaded, partial(processor, video_limits=ALLOWED)):
        with pytest.raises(VideoDecodingError, match="max_frames=7"):
            permitted(address)
    assert processor.video_limits == {"max_frames": 7}


@pytest.mark.parametrize("stored", [ALLOWED, {**ALLOWED, "max_frames": 99}])
def test_a_file_cannot_permit_them(address, stored, tmp_path):
    path = tmp_path / "preprocessor_config.json"
    ViViTVideoProcessor(**SMALL, video_limits=ALLOWED).save_pretrained(tmp_path)
    saved = json.loads(path.read_text())
    assert saved["video_limits"] is None
    settings = {**saved, "video_limits": stored, "allow_private_addresses": True}
    path.write_text(json.dumps(settings))
    for loaded in (
        ViViTVideoProcessor.from_pretrained(tmp_path),
        ViViTVideoProcessor.from_pretrained(tmp_path, num_frames=4),
        ViViTVideoProcessor.from_pretrained(tmp_path, video_limits={"max_frames": 50}),
        AutoImageProcessor.from_pretrained(tmp_path),
        ViViTVideoProcessor.from_dict(settings),
        ViViTVideoProcessor.from_json_file(path),
        ViViTVideoProcessor.from_pretrained(tmp_path, return_unused_kwargs=True)[0],
    ):
        assert not VideoLimits(**(loaded.video_limits or {})).allow_private_addresses
        with pytest.raises(VideoDecodingError, match=REFUSED):
            loaded(address)
    assert ViViTVideoProcessor.from_pretrained(tmp_path).video_limits in (None, {"max_frames": 99})


@pytest.mark.parametrize("name", ["video_preprocessor_config.json", "processor_config.json"])
def test_nor_can_the_files_of_transformers_5(address, name, tmp_path):
    settings = {**ViViTVideoProcessor(**SMALL).to_dict(), "video_limits": ALLOWED}
    settings["video_processor_type"] = settings.pop("image_processor_type")
    stored = {"video_processor": settings} if name == "processor_config.json" else settings
    (tmp_path / name).write_text(json.dumps(stored))
    loaded = ViViTVideoProcessor.from_pretrained(tmp_path)
    assert loaded.num_frames == 4 and not loaded.video_limits
    with pytest.raises(VideoDecodingError, match=REFUSED):
        loaded(address)


def test_limits_are_numbers_and_the_permission_is_true_or_false():
    for value in ("yes", 1, None):
        with pytest.raises(ValueError, match=r"`allow_private_addresses=.*` must be True or False"):
            ViViTVideoProcessor(video_limits={"allow_private_addresses": value})
    with pytest.raises(ValueError, match=r"`video_limits=.*` must be a dictionary"):
        ViViTVideoProcessor(video_limits=["allow_private_addresses"])
    for value in ("1", None, 0, -1, float("nan"), True, [1]):
        with pytest.raises(ValueError, match=r"`max_bytes=.*` must be"):
            VideoLimits(max_bytes=value)


@pytest.fixture(scope="module")
def model():
    return make_model(case_config("factorised_encoder", num_labels=2))


def test_every_way_in_needs_the_permission_and_shows_no_secret(address, model, tmp_path, caplog):
    config = model.config
    settings = {"num_frames": config.num_frames, "size": 40, "crop_size": tuple(config.frame_size)}
    sealed, permitted = ViViTVideoProcessor(**settings), ViViTVideoProcessor(**settings, video_limits=ALLOWED)
    for num_workers in (0, 1):
        refused, read = (
            next(predict_videos(model, one, [address], num_workers=num_workers)) for one in (sealed, permitted)
        )
        assert REFUSED in refused.error and "hunter2" not in refused.error and read.logits is not None
    assert len(list(file_windows(model, permitted, address))) >= 1
    with pytest.raises(VideoDecodingError, match=REFUSED):
        list(file_windows(model, sealed, address))
    with pytest.raises(VideoDecodingError, match="None of the videos") as caught:
        sealed([address, "http://u:hunter2@a\u2100.com/"], on_error="skip")
    both = permitted([address, "http://[::1", "http://u:hunter2@a\u2100.com/"], on_error="skip")
    assert both.kept == [0] and "malformed" in both.reports[1].error
    assert "hunter2" not in f"{caught.value} {both.reports} {caplog.text}"
    model.save_pretrained(tmp_path)
    permitted.save_pretrained(tmp_path)
    with pytest.raises(VideoDecodingError, match=REFUSED):
        pipeline("video-classification", model=str(tmp_path))(address)


def test_live_video_shows_no_password():
    for address in ("rtsp://u:hunter2@127.0.0.1:1/cam", "tcp://u:hunter2@127.0.0.1:1", "http://u:hunter2@127.0.0.1:1/"):
        with pytest.raises(VideoDecodingError, match=r"//\*\*\*@127\.0\.0\.1:1") as caught:
            LiveVideo(address, timeout=2)
        assert "hunter2" not in str(caught.value) and caught.value.__suppress_context__
