"""The "video-classification" pipeline of transformers, with frames as `ViViTVideoProcessor` samples them."""

from typing import Any

from transformers.pipelines.video_classification import VideoClassificationPipeline

from ..configuration_vivit import ViViTConfig
from ..video_processing_vivit import ViViTVideoProcessor
from .finite_outputs import check_finite


class ViViTVideoClassificationPipeline(VideoClassificationPipeline):
    """
    Replace `transformers.VideoClassificationPipeline`; nothing changes for other models and processors.

    A `ViViTVideoProcessor` decodes and samples the video, whether it comes from the model's folder, as
    `video_processor` or as `image_processor` (with which transformers would only use the first frames of the file).
    `num_frames` and `frame_sampling_rate` set the processor's `num_frames` and `frame_stride`.

    Raises:
        NonFiniteError: if the scores of a ViViT are NaN or infinite.
    """

    def __init__(self, *args: Any, image_processor: Any = None, video_processor: Any = None, **kwargs: Any) -> None:
        if video_processor is None and isinstance(image_processor, ViViTVideoProcessor):
            video_processor = image_processor
        super().__init__(*args, image_processor=image_processor, video_processor=video_processor, **kwargs)

    def preprocess(self, video: Any, num_frames: int | None = None, frame_sampling_rate: int | None = None) -> Any:
        """
        Return the `pixel_values` of one video, (1, num_frames, channels, height, width).

        Raises:
            ValueError: if a `frame_sampling_rate` is given, but the frames are spread over the whole video.
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
        return processor(video, **settings).to(self.dtype)

    def postprocess(self, model_outputs: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self.model.config, ViViTConfig):
            check_finite(model_outputs.logits, self.model)
        return super().postprocess(model_outputs, *args, **kwargs)
