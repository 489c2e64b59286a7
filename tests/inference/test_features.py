"""Features of videos: equal to the model's own outputs on the same pixels, with the times of their frames."""

import numpy as np
import pytest
import torch
from tiny_models import case_config, make_model, tiny_config
from video_files import moving_frames, plain_decode, write_video

from vivit_hf import ViViTModel, ViViTVideoProcessor
from vivit_hf.inference import embed_videos


CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def make_processor(config, **settings):
    height, width = config.frame_size
    crop = {"size": {"shortest_edge": 30}, "crop_size": {"height": height, "width": width}}
    return ViViTVideoProcessor(**{"num_frames": config.num_frames, "frame_stride": 1, **crop, **settings})


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    """A long and a short video, whose clips overlap, with frames at irregular times."""
    folder = tmp_path_factory.mktemp("videos")
    pts = np.cumsum(np.arange(40) % 5 * 10 + 20)
    return [
        write_video(folder / "long.mp4", num_frames=40, pts=pts),
        write_video(folder / "short.mp4", moving_frames(12)[::-1]),
    ]


VIEWS = [{"num_clips": 1, "num_crops": 1}, {"num_clips": 3, "num_crops": 3}]


@pytest.mark.parametrize("views", VIEWS, ids=["one view", "3 x 3 views"])
def test_a_vector_is_the_pooled_output_averaged_over_the_views(case, videos, views):
    model = make_model(case_config(case))
    processor = make_processor(model.config)
    found = list(embed_videos(model, processor, videos, **views))
    for video, one in zip(videos, found, strict=True):
        with torch.no_grad():
            pooled = model.vivit(processor(video, **views)["pixel_values"]).pooler_output
        torch.testing.assert_close(torch.from_numpy(one.vectors), pooled.mean(dim=0), **CLOSE)
        assert one.error is None and one.times is None and one.vectors.dtype == np.float32


@pytest.mark.parametrize("views", VIEWS, ids=["one view", "3 x 3 views"])
def test_a_vector_per_step_is_the_models_own(case, videos, views):
    config = case_config(case)
    model = make_model(config)
    processor = make_processor(config)
    time, clips = config.grid_size[0], views["num_clips"]
    for video, one in zip(videos, embed_videos(model, processor, videos, per_step=True, **views), strict=True):
        features = processor(video, **views)
        with torch.no_grad():
            if config.attention_type == "factorised_encoder":
                steps = model.vivit.encode_steps(features["pixel_values"])
            else:
                tokens = model.vivit(features["pixel_values"]).last_hidden_state
                space = config.grid_size[1] * config.grid_size[2]
                tokens = tokens[:, tokens.shape[1] - time * space :]
                steps = torch.stack([tokens[:, t * space : (t + 1) * space].mean(dim=1) for t in range(time)], dim=1)
        steps = steps.reshape(clips, views["num_crops"], time, -1).mean(dim=1).flatten(0, 1)
        order = np.argsort(times_of(features, config, views), kind="stable")
        torch.testing.assert_close(torch.from_numpy(one.vectors), steps[torch.from_numpy(order)], **CLOSE)


def times_of(features, config, views):
    """The time of the middle frame of each step of each clip."""
    rows = features.frame_times[:: views["num_crops"]]
    if config.embedding_type == "uniform_frame_sampling":
        # 4 of 8 frames at multiples of 8 / 5, rounded
        return rows[:, [2, 3, 5, 6]].reshape(-1)
    return rows[:, 1::2].reshape(-1)


def test_the_times_of_steps_are_those_of_the_file(videos):
    """One clip of 8 frames from the middle of 40, in tubelets of 2: their second frames are 17, 19, 21 and 23."""
    model = make_model(tiny_config("factorised_encoder"))
    processor = make_processor(model.config)
    pts = np.cumsum(np.arange(40) % 5 * 10 + 20) / 1000
    (one,) = embed_videos(model, processor, videos[:1], per_step=True)
    np.testing.assert_allclose(one.times, pts[[17, 19, 21, 23]] - pts[0], atol=2e-3)
    (one,) = embed_videos(model, processor, videos[:1], per_step=True, num_clips=4)
    assert len(one.times) == 16 and (np.diff(one.times) >= 0).all()


def test_a_part_of_a_file_has_the_features_of_its_frames(videos, variant):
    model = make_model(tiny_config(variant))
    processor = make_processor(model.config)
    pts = np.cumsum(np.arange(40) % 5 * 10 + 20) / 1000 - 0.02
    part = {"path": str(videos[0]), "start": float(pts[10]), "end": float(pts[18])}
    frames = plain_decode(videos[0])[10:18]
    (expected,) = embed_videos(model, processor, [frames], per_step=True)
    (found,) = embed_videos(model, processor, [part], per_step=True)
    # The scaler of the decoder and PIL round differently by one of 255.
    np.testing.assert_allclose(found.vectors, expected.vectors, atol=0.05)
    np.testing.assert_allclose(found.times, pts[[11, 13, 15, 17]], atol=2e-3)
    assert np.isnan(expected.times).all()


def test_a_video_that_cannot_be_read_has_an_error_and_the_others_stay_as_they_are(videos, tmp_path):
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    model = make_model(tiny_config("spatio_temporal"))
    processor = make_processor(model.config)
    first, broken, last = embed_videos(model, processor, [videos[0], tmp_path / "broken.mp4", videos[1]])
    assert broken.vectors is None and "broken.mp4" in broken.error and broken.index == 1
    for one, expected in zip((first, last), embed_videos(model, processor, videos), strict=True):
        np.testing.assert_allclose(one.vectors, expected.vectors, **CLOSE)


def test_features_that_are_not_finite_are_errors(videos):
    model = make_model(tiny_config("factorised_encoder"))
    processor = make_processor(model.config)

    def divide_by_zero_if_white(_module, given, tokens):
        is_white = (given[0] == 1).flatten(1).all(dim=1)
        return tokens[0] / (~is_white).float()[:, None, None, None], tokens[1]

    model.vivit.embeddings.register_forward_hook(divide_by_zero_if_white)
    white = np.full((8, 30, 50, 3), 255, dtype=np.uint8)
    first, bad, last = embed_videos(model, processor, [videos[0], white, videos[1]], batch_size=3)
    assert "NaN or infinite" in bad.error and bad.index == 1
    assert first.vectors is not None and last.vectors is not None and last.index == 2


def test_a_backbone_alone_has_the_same_features(videos, variant):
    model = make_model(tiny_config(variant))
    backbone = ViViTModel(model.config).eval()
    backbone.load_state_dict(model.vivit.state_dict())
    processor = make_processor(model.config)
    for per_step in (False, True):
        (expected,) = embed_videos(model, processor, videos[:1], per_step=per_step)
        (found,) = embed_videos(backbone, processor, videos[:1], per_step=per_step)
        assert np.array_equal(found.vectors, expected.vectors)


def test_half_precision_gives_float32_vectors_close_to_those_of_float32(videos, variant):
    model = make_model(tiny_config(variant))
    processor = make_processor(model.config)
    expected = [one.vectors for one in embed_videos(model, processor, videos, num_clips=2)]
    found = [one.vectors for one in embed_videos(model.to(torch.bfloat16), processor, videos, num_clips=2)]
    for one, other in zip(found, expected, strict=True):
        cosine = one @ other / np.linalg.norm(one) / np.linalg.norm(other)
        assert one.dtype == np.float32 and cosine > 0.999


def test_clips_of_another_size_are_refused(videos):
    model = make_model(tiny_config("factorised_encoder"))
    for per_step in (False, True):
        with pytest.raises(ValueError, match=r"The model expects clips of \(8, 24, 40\)"):
            list(embed_videos(model, make_processor(model.config, num_frames=6), videos, per_step=per_step))
