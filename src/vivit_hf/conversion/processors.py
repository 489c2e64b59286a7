"""Read the processor of a source, and describe how a processor prepares frames."""

from __future__ import annotations

import torch

from ..video_processing_vivit import ViViTVideoProcessor
from .command import warn
from .weight_files import has_processor


def read_processor(source: str) -> ViViTVideoProcessor | None:
    """Read the processor beside the weights of a folder or Hub id; return None after a warning if there is none."""
    if has_processor(source):
        return ViViTVideoProcessor.from_pretrained(source)
    warn(f"{source} has no preprocessor_config.json; using values in [-1, 1], as the official models do")
    return None


def value_range(processor: ViViTVideoProcessor) -> tuple[float, float]:
    """Return the smallest and largest pixel value that the processor gives for black and white, over all channels."""
    channels = max(3, len(processor.image_mean))
    extremes = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, channels, 1, 1)
    values = processor.rescale_and_normalize(extremes)
    return values.min().item(), values.max().item()


def describe_processor(processor: ViViTVideoProcessor) -> str:
    """Describe in words how frames become pixel values."""
    low, high = value_range(processor)
    size = processor.size
    resized = (
        f"short side {size['shortest_edge']}" if "shortest_edge" in size else f"{size['height']} x {size['width']}"
    )
    crop = processor.crop_size
    crop = f", central crop {crop['height']} x {crop['width']}" if processor.do_center_crop else ""
    frames = f"{processor.num_frames} frames, stride {processor.frame_stride}"
    return f"{frames}, {resized}{crop}, values in [{low:.3g}, {high:.3g}]"
