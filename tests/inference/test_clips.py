"""Clips of one video that overlap share their tubelets, and the logits stay those of the model."""

import numpy as np
import pytest
import torch
from tiny_models import make_model, tiny_config
from video_files import write_video

from vivit_hf import ViViTVideoProcessor
from vivit_hf.inference.clips import predict_clips
from vivit_hf.inference.prediction import predict_videos
from vivit_hf.inference.views import predict_views


SIZE = {"size": {"shortest_edge": 28}, "crop_size": {"height": 24, "width": 40}}


def make_frames(count, height=30, width=50, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def test_clips_of_another_length_are_refused_whether_or_not_they_share_tubelets():
    """The embeddings of a short clip would be interpolated, and the scores be those of no training."""
    model = make_model(tiny_config("factorised_encoder"))
    processor = ViViTVideoProcessor(num_frames=4, **SIZE)
    features = processor(make_frames(9), num_clips=4)
    for ids in (features.frame_ids, None):
        with pytest.raises(ValueError, match=r"The model expects clips of \(8, 24, 40\).*got \(4, 24, 40\)"):
            predict_clips(model, features["pixel_values"], ids)


def count_tubelets(model):
    """How many tubelets go through the spatial encoder, in a list."""
    seen = []
    encode = model.vivit.encode_space

    def counted(tokens, *arguments, **keywords):
        seen.append(tokens.shape[0] * tokens.shape[1])
        return encode(tokens, *arguments, **keywords)

    model.vivit.encode_space = counted
    return seen


@pytest.mark.parametrize("num_crops", [1, 3])
def test_clips_of_one_video_share_their_tubelets(tmp_path, num_crops):
    """4 clips of 8 frames in 14: they begin at 0, 2, 4 and 6, and hold 7 tubelets instead of 16."""
    path = write_video(tmp_path / "video.mp4", make_frames(14, 48, 100))
    model = make_model(tiny_config("factorised_encoder", image_size=(24, 24)))
    processor = ViViTVideoProcessor(num_frames=8, frame_stride=1, size={"shortest_edge": 24}, crop_size=24)
    features = processor([path, path], num_clips=4, num_crops=num_crops)
    with torch.no_grad():
        expected = model(features["pixel_values"]).logits
    seen = count_tubelets(model)
    found = predict_clips(model, features["pixel_values"], features.frame_ids)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert sum(seen) == 7 * num_crops, "the same file twice is the same, where the numbers say so"

    seen.clear()
    batch = features["pixel_values"].unflatten(0, (2, -1))
    ids = features.frame_ids.reshape(2, 4 * num_crops, -1)
    torch.testing.assert_close(predict_views(model, batch, 16, ids).flatten(0, 1), expected, atol=1e-5, rtol=1e-5)
    assert sum(seen) == 2 * 7 * num_crops, "frames of one video are none of another"

    seen.clear()
    (prediction,) = predict_videos(model, processor, [path], num_clips=4, num_crops=num_crops, averaging="logits")
    torch.testing.assert_close(
        torch.from_numpy(prediction.logits), expected[: 4 * num_crops].mean(0), atol=1e-5, rtol=1e-5
    )
    assert sum(seen) == 7 * num_crops


def test_random_crops_share_nothing(tmp_path):
    path = write_video(tmp_path / "video.mp4", make_frames(14, 48, 100))
    processor = ViViTVideoProcessor(num_frames=8, frame_stride=1, size={"shortest_edge": 24}, crop_size=24)
    ids = processor(path, num_clips=4, crop_position="random", generator=0).frame_ids
    assert len(np.unique(ids)) == ids.size
    given = processor(make_frames(14), num_clips=2).frame_ids
    assert np.array_equal(given, np.stack([np.arange(8), np.arange(6, 14)]))
