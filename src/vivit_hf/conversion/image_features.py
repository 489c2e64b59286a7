"""A frozen image model as a video model: Model 2 without a temporal encoder, for a feature of every frame."""

from ..initialisation import config_from_vit, initialise_from_vit, processor_for
from ..initialisation.image_models import image_structure
from ..initialisation.image_sources import read_image_source
from ..initialisation.weight_files import read_config
from ..modeling_vivit import ViViTForVideoClassification
from ..video_processing_vivit import ViViTVideoProcessor


LARGEST_DEFAULT_SIZE = 224  # image models of 384 and 518 pixels are common, and a clip has 16 times their tokens


def is_image_model(source: str) -> bool:
    """Return whether a folder or Hub id holds another model than a ViViT, by its config.json."""
    return read_config(source).get("model_type") not in ("vivit_hf", "vivit")


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
    structure = image_structure(image.vit.config)
    vivit_config = config_from_vit(
        image.vit.config,
        attention_type="factorised_encoder",
        num_temporal_layers=0,
        tubelet_size=[1, *structure.patch_size],
        num_frames=num_frames,
        image_size=min(LARGEST_DEFAULT_SIZE, *structure.image_size),
        num_labels=0,
    )
    model = ViViTForVideoClassification(vivit_config).eval()
    initialise_from_vit(model, image)
    processor = processor_for(vivit_config, image.processor_settings)
    processor.frame_sampling = "uniform"
    return model, processor
