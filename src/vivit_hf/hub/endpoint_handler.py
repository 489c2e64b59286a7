"""
The handler of a Hugging Face Inference Endpoint: the labels of the video in a request.

    {"inputs": {"video": "<base64, or an address>"}, "parameters": {"top_k": 5}}

`push_to_hub(..., endpoint=True)` uploads a copy of this file as `handler.py`. It runs where vivit_hf is
not installed, with the code beside the weights.
"""

import base64
from typing import Any

import torch
from transformers import AutoImageProcessor, AutoModelForVideoClassification


EXPECTED = 'Expected {"inputs": {"video": "<the file in base64, or its http(s) address>"}}.'
# The most that a video may cost, see `VideoLimits`. Addresses must be public.
LIMITS = {
    "max_bytes": 100_000_000,
    "max_duration": 600.0,
    "max_frames": 36_000,
    "max_pixels": 4096 * 2304,
    "max_decoded_pixels": 8_000_000_000,
    "download_timeout": 30.0,
    "decoding_timeout": 30.0,
}
MOST_TOP_K = 1000
# Clips that the model sees at a time.
BATCH = 16


class EndpointHandler:
    """
    Classify videos with the model in the folder `path`.

    Scores are averaged over as many views as `vivit-hf classify` takes: 4 clips (1 if the frames are spread over the
    whole video) x 3 crops (1 if the processor does not crop). The calibration of a model is applied, except for the
    answer "none of these".
    """

    def __init__(self, path: str = ""):
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = AutoModelForVideoClassification.from_pretrained(path, trust_remote_code=True).to(device).eval()
        self.processor = AutoImageProcessor.from_pretrained(path, trust_remote_code=True, video_limits=LIMITS)
        self.processor.on_error = "repeat_last"

    def __call__(self, data: dict[str, Any]) -> list[dict[str, Any]]:
        """
        Return the likeliest labels of a video, [{"label", "score"}], with several groups of labels also "group".

        Args:
            data: "inputs", and "parameters" with "top_k", "num_clips" and "num_crops", all of them optional.

        Raises:
            ValueError: for a request that cannot be read, with what is expected.
            VideoDecodingError: for a video that cannot be read, or is over the limits.
        """
        parameters = {
            "top_k": 5,
            "num_clips": 1 if self.processor.frame_sampling == "uniform" else 4,
            "num_crops": 3 if self.processor.do_center_crop else 1,
        }
        given = data.get("parameters") or {}
        if not isinstance(given, dict) or given.keys() - parameters:
            raise ValueError(f"`parameters={given!r}` must be of {', '.join(parameters)}.")
        parameters |= given
        top_k = parameters.pop("top_k")
        if not isinstance(top_k, int) or isinstance(top_k, bool) or not 1 <= top_k <= MOST_TOP_K:
            raise ValueError(f"`top_k={top_k!r}` must be a whole number from 1 to {MOST_TOP_K}.")
        source = {"bytes": None, "path": None, **video_in(data.get("inputs"))}
        views = self.processor(source, return_tensors="pt", **parameters).to(self.model.device)
        starts = range(0, len(views["pixel_values"]), BATCH)
        with torch.inference_mode():
            # `pixel_values`, and `frame_mask` if the processor masks the ends of short videos
            parts = [{name: value[start : start + BATCH] for name, value in views.items()} for start in starts]
            logits = torch.cat([self.model(**part).logits for part in parts])
        return self.ranked(logits.float().cpu(), top_k)

    def ranked(self, logits: torch.Tensor, top_k: int) -> list[dict[str, Any]]:
        """Return the `top_k` likeliest labels of each group by the logits of all views, (views, num_labels)."""
        config = self.model.config
        groups = config.label_groups or {"": config.num_labels}
        calibration = config.calibration or {}
        temperatures = calibration.get("temperatures") or [1.0] * len(groups)
        thresholds = calibration.get("thresholds") or [float("-inf")] * config.num_labels
        found, start = [], 0
        for (group, size), temperature in zip(groups.items(), temperatures, strict=True):
            # (views, labels of the group) -> (labels of the group,)
            scores = self.averaged(logits[:, start : start + size], temperature)
            for index in scores.argsort(descending=True, stable=True)[:top_k].tolist():
                label, score = str(config.id2label[start + index]), scores[index].item()
                one = {"label": label.removeprefix(f"{group}: ") if group else label, "score": round(score, 4)}
                if score >= thresholds[start + index]:
                    found.append({**one, "group": group} if group else one)
            start += size
        return found

    def averaged(self, logits: torch.Tensor, temperature: float) -> torch.Tensor:
        """Return the scores (labels,) of one group by the logits of all views, (views, labels)."""
        config = self.model.config
        problem = config.problem_type or ("regression" if config.num_labels == 1 else None)
        if problem == "regression":
            return logits.mean(dim=0)
        of_logits = (config.calibration or {}).get("averaging") == "logits"
        if problem == "multi_label_classification":
            logits = logits if of_logits else logits.double().sigmoid().mean(dim=0, keepdim=True).logit()
            return (logits.mean(dim=0) / temperature).sigmoid()
        logits = logits if of_logits else logits.softmax(dim=-1).mean(dim=0, keepdim=True).log()
        return (logits.mean(dim=0) / temperature).softmax(dim=-1)


def video_in(inputs: Any) -> dict[str, Any]:
    """Return the video of a request as an input of the processor. No file of this machine is opened."""
    video = inputs.get("video") if isinstance(inputs, dict) else inputs
    if isinstance(video, bytes):
        return {"bytes": video}
    if not isinstance(video, str) or not video:
        raise ValueError(f"There is no video in the request. {EXPECTED}")
    if video.startswith(("http://", "https://")):
        return {"path": video}
    if video.startswith("data:"):
        video = video.partition(",")[2]
    try:
        return {"bytes": base64.b64decode(video, validate=True)}
    except ValueError:  # of which binascii.Error is one
        raise ValueError(f"The video is neither base64 nor an http(s) address. {EXPECTED}") from None
