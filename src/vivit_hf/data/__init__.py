"""Read labelled videos, labels, splits and Hub data sets, and scan videos for damage."""

from typing import TYPE_CHECKING

from .. import lazy_exports


if TYPE_CHECKING:
    from .annotation_rows import AnnotationError as AnnotationError
    from .annotations import Annotations as Annotations, LabelledVideo as LabelledVideo, read_videos as read_videos
    from .hub_datasets import (
        StreamedVideos as StreamedVideos,
        hub_videos as hub_videos,
        load_hub_dataset as load_hub_dataset,
        unlabelled_videos as unlabelled_videos,
    )
    from .labels import LabelMap as LabelMap, split_videos as split_videos, to_probabilities as to_probabilities
    from .scan import VideoScan as VideoScan, find_videos as find_videos, scan_files as scan_files

__getattr__, __dir__, __all__ = lazy_exports(__name__)
