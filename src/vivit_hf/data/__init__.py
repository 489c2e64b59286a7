"""Read labelled videos, labels, splits and Hub data sets, and scan videos for damage."""

from typing import TYPE_CHECKING

from .. import lazy_exports


if TYPE_CHECKING:
    from .annotation_rows import AnnotationError as AnnotationError
    from .annotations import Annotations as Annotations
    from .annotations import LabelledVideo as LabelledVideo
    from .annotations import read_videos as read_videos
    from .hub_datasets import StreamedVideos as StreamedVideos
    from .hub_datasets import hub_videos as hub_videos
    from .hub_datasets import load_hub_dataset as load_hub_dataset
    from .hub_datasets import unlabelled_videos as unlabelled_videos
    from .labels import LabelMap as LabelMap
    from .labels import split_videos as split_videos
    from .labels import to_probabilities as to_probabilities
    from .scan import VideoScan as VideoScan
    from .scan import find_videos as find_videos
    from .scan import scan_files as scan_files

__getattr__, __dir__, __all__ = lazy_exports(
    __name__,
    {
        "annotation_rows": "AnnotationError",
        "annotations": "Annotations LabelledVideo read_videos",
        "hub_datasets": "StreamedVideos hub_videos load_hub_dataset unlabelled_videos",
        "labels": "LabelMap split_videos to_probabilities",
        "scan": "VideoScan find_videos scan_files",
    },
)
