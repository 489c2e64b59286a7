"""What a user does with a trained model: faster inference, predictions, features, search, streams, scores."""

from typing import TYPE_CHECKING

from .. import lazy_exports


if TYPE_CHECKING:
    from .batch_predictor import BatchPredictor as BatchPredictor
    from .clips import predict_clips as predict_clips
    from .demo_model import demo_model_path as demo_model_path
    from .evaluation import Evaluation as Evaluation, evaluate_videos as evaluate_videos
    from .feature_files import Features as Features, read_features as read_features, write_features as write_features
    from .features import VideoEmbedding as VideoEmbedding, embed_videos as embed_videos
    from .fingerprints import hub_commit as hub_commit, model_fingerprint as model_fingerprint
    from .finite_outputs import NonFiniteError as NonFiniteError
    from .live_video import LiveVideo as LiveVideo
    from .metrics import classification_metrics as classification_metrics
    from .optimization import OptimizationReport as OptimizationReport, optimize as optimize, restore as restore
    from .pipeline import ViViTVideoClassificationPipeline as ViViTVideoClassificationPipeline
    from .prediction import VideoPrediction as VideoPrediction, predict_videos as predict_videos
    from .search import find_duplicates as find_duplicates, search_features as search_features
    from .segments import Segment as Segment, merge_windows as merge_windows
    from .streaming import StreamingClassifier as StreamingClassifier, WindowPrediction as WindowPrediction
    from .timeline import video_timeline as video_timeline, watch_video as watch_video
    from .token_merging import decreasing_schedule as decreasing_schedule
    from .views import average_views as average_views, describe_views as describe_views, predict_views as predict_views

__getattr__, __dir__, __all__ = lazy_exports(__name__)
