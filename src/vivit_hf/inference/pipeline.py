"""The "video-classification" pipeline of transformers, with frames as `ViViTVideoProcessor` samples them."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.pipelines.video_classification import VideoClassificationPipeline

from ..configuration_vivit import ViViTConfig
from ..data.labels import LabelMap, to_probabilities
from ..video_processing_vivit import ViViTVideoProcessor
from .clips import check_takes_masks, shown_masks
from .finite_outputs import check_finite
from .unknown import UNKNOWN, UnknownRule, classifier_inputs
from .views import average_views


@dataclass
class _Output(ImageClassifierOutput):
    unknown_score: torch.Tensor | None = None  # (1,)


class ViViTVideoClassificationPipeline(VideoClassificationPipeline):
    """
    Replace `transformers.VideoClassificationPipeline`; nothing changes for other models and processors.

    A `ViViTVideoProcessor` decodes and samples the video, whether it comes from the model's folder, as
    `video_processor` or as `image_processor` (with which transformers would only use the first frames of the file).
    `num_frames` and `frame_sampling_rate` set the processor's `num_frames` and `frame_stride`. The scores are those of
    `predict_videos`: averaged over the processor's views, and with `label_groups` probabilities within each group. A
    video that is unknown to the model has the single label "none of these".

    Raises:
        NonFiniteError: if the scores of a ViViT are NaN or infinite.
    """

    def __init__(self, *args: Any, image_processor: Any = None, video_processor: Any = None, **kwargs: Any) -> None:
        if video_processor is None and isinstance(image_processor, ViViTVideoProcessor):
            video_processor = image_processor
        super().__init__(*args, image_processor=image_processor, video_processor=video_processor, **kwargs)
        self._rule: Any = UnknownRule.of(self.model)

    def _sanitize_parameters(self, function_to_apply: str | None = None, **settings: Any) -> Any:
        before, forward, after = super()._sanitize_parameters(function_to_apply=function_to_apply, **settings)
        if function_to_apply is None:  # up to 5.22, transformers puts "softmax" there, whatever the model's labels are
            after.pop("function_to_apply", None)
        return before, forward, after

    def preprocess(self, video: Any, num_frames: int | None = None, frame_sampling_rate: int | None = None) -> Any:
        """
        Return the `pixel_values` of one video, with our processor (1, views, frames, channels, height, width), and its
        `frame_mask` (1, views, frames) if the processor masks.

        Raises:
            ValueError: if a `frame_sampling_rate` is given, but the frames are spread over the whole video, or if the
                processor masks frames and the model does not take masks.
        """
        processor = self.video_processor
        if not isinstance(processor, ViViTVideoProcessor):
            return super().preprocess(video, num_frames, 1 if frame_sampling_rate is None else frame_sampling_rate)
        if frame_sampling_rate is not None and processor.frame_sampling == "uniform":
            raise ValueError(
                f"`frame_sampling_rate={frame_sampling_rate}` has no effect for a processor with "
                "frame_sampling='uniform', which spreads its frames over the whole video; leave it out."
            )
        settings: dict[str, Any] = {"num_frames": num_frames or self.model.config.num_frames}
        settings |= {"frame_stride": frame_sampling_rate, "do_sample_frames": True}
        check_takes_masks(self.model, processor)
        features = processor(video, **settings)
        return {name: value[None] for name, value in features.to(self.dtype).items()}

    def _forward(self, model_inputs: Any) -> Any:
        if not isinstance(self.video_processor, ViViTVideoProcessor):
            return super()._forward(model_inputs)
        # (batch * views, frames, channels, height, width), with a mask also (batch * views, frames)
        clips = {name: value.flatten(0, 1) for name, value in model_inputs.items()}
        if "frame_mask" in clips:
            clips["frame_mask"] = shown_masks(clips["frame_mask"], self.model.config)
        if self._rule is None:
            logits = self.model(**clips).logits
            return ImageClassifierOutput(logits=logits.unflatten(0, model_inputs["pixel_values"].shape[:2]))
        with classifier_inputs(self.model) as seen:
            logits = self.model(**clips).logits
        logits, features = (
            one.unflatten(0, model_inputs["pixel_values"].shape[:2]) for one in (logits, torch.cat(seen))
        )
        return _Output(logits=logits, unknown_score=self._rule.scores(logits, features))

    def postprocess(self, model_outputs: Any, **settings: Any) -> Any:
        config, logits = self.model.config, model_outputs.logits  # (1, [views,] num_labels)
        if isinstance(config, ViViTConfig) or logits.ndim == 3:
            check_finite(logits, self.model)
            label_map = LabelMap.from_config(config)
            score = getattr(model_outputs, "unknown_score", None)
            if score is not None and self._rule.is_unknown(float(score), num_views=logits.shape[1]):
                return [{"label": UNKNOWN, "score": 1.0}]
            logits = average_views(logits.reshape(1, -1, config.num_labels), label_map)  # (1, num_labels)
            if settings.setdefault("function_to_apply", None) is None:
                logits, settings["function_to_apply"] = to_probabilities(logits, label_map), "none"
            model_outputs = ImageClassifierOutput(logits=logits)
        return super().postprocess(model_outputs, **settings)
