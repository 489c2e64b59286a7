"""A frozen image ViT as a video model: Model 2 without a temporal encoder, for a feature of every frame."""

from __future__ import annotations

from ..initialisation import config_from_vit, initialise_from_vit, processor_for
from ..modeling_vivit import ViViTForVideoClassification
from ..video_processing_vivit import ViViTVideoProcessor
from .image_sources import read_image_source
from .weight_files import read_config


LARGEST_DEFAULT_SIZE = 224  # image models of 384 and 518 pixels are common, and a clip has 16 times their tokens


def is_image_model(source: str) -> bool:
    """Return whether a folder or Hub id holds another model than a ViViT, by its config.json."""
    return read_config(source).get("model_type") not in ("vivit_hf", "vivit")


def vivit_from_image(source: str, num_frames: int) -> tuple[ViViTForVideoClassification, ViViTVideoProcessor]:
    """
    Return an image ViT as a Model 2 whose time steps are frames, and its processor.

    The features of a step equal those of the image ViT on its frame. The clip's are their mean. The frames are spread
    over the whole video, and have the size of the image model, at most 224 pixels.

    Args:
        source: see `read_image_source`.
        num_frames: frames per clip.

    Raises:
        ConversionError: see `read_image_source`.
    """
    image = read_image_source(source)
    config = image.vit.config
    size, patch = ([one, one] if isinstance(one, int) else list(one) for one in (config.image_size, config.patch_size))
    vivit_config = config_from_vit(
        config,
        attention_type="factorised_encoder",
        num_temporal_layers=0,
        tubelet_size=[1, *patch],
        num_frames=num_frames,
        image_size=min(LARGEST_DEFAULT_SIZE, *size),
        num_labels=0,
    )
    model = ViViTForVideoClassification(vivit_config).eval()
    initialise_from_vit(model, image.vit)
    processor = processor_for(vivit_config, image.processor_settings)
    processor.frame_sampling = "uniform"
    return model, processor
