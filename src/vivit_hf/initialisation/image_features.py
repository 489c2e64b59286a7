"""A frozen image model as a video model: Model 2 without a temporal encoder, for a feature of every frame."""

from typing import Any

from ..modeling_vivit import ViViTForVideoClassification
from ..video_processing_vivit import ViViTVideoProcessor
from .from_image import config_from_vit, initialise_from_vit
from .image_models import image_structure
from .image_sources import read_image_source
from .model_processor import processor_for
from .weight_files import read_config


_LARGEST_DEFAULT_SIZE = 224  # image models of 384 and 518 pixels are common, and a clip has 16 times their tokens


def is_image_model(source: str) -> bool:
    """Return whether a folder or Hub id holds another model than a ViViT, by its config.json."""
    return read_config(source).get("model_type") not in ("vivit_hf", "vivit")


def default_image_size(image_config: Any) -> int:
    """Return the frame size of a video model that starts from an image model, in pixels."""
    return min(_LARGEST_DEFAULT_SIZE, *image_structure(image_config).image_size)


def vivit_from_image(source: str, num_frames: int) -> tuple[ViViTForVideoClassification, ViViTVideoProcessor]:
    """
    Return an image model as a Model 2 whose time steps are frames, and its processor.

    The features of a step equal those of the image model on its frame: its class token, or the mean of its patches. The
    clip's are their mean. The frames are spread over the whole video, and have the size of the image model, at most 224
    pixels.

    Args:
        source: see `read_image_source`.
        num_frames: frames per clip.

    Raises:
        ConversionError: see `read_image_source`.
    """
    image = read_image_source(source)
    vivit_config = config_from_vit(
        image.vit.config,
        attention_type="factorised_encoder",
        num_temporal_layers=0,
        tubelet_size=[1, *image_structure(image.vit.config).patch_size],
        num_frames=num_frames,
        image_size=default_image_size(image.vit.config),
        num_labels=0,
    )
    model = ViViTForVideoClassification(vivit_config).eval()
    initialise_from_vit(model, image)
    processor = processor_for(vivit_config, image.processor_settings)
    processor.frame_sampling = "uniform"
    return model, processor
