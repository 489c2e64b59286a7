"""
A page that classifies a clip, says what happens when, and shows where the model looked. See examples/app.py.

It works without the internet: the page loads nothing from elsewhere, and nothing is reported to anyone.
"""

import argparse
import html
import logging
import math
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import gradio as gr
import torch
from safetensors import SafetensorError

from vivit_hf import ViViTForVideoClassification, ViViTVideoProcessor, demo_model_path
from vivit_hf.inference import describe_views, predict_videos
from vivit_hf.labels import LabelMap
from vivit_hf.overlays import explain_clip, save_explanation
from vivit_hf.streaming import StreamingClassifier
from vivit_hf.timeline import Segment, video_timeline
from vivit_hf.video_decoding import VideoReader
from vivit_hf.video_sources import VideoDecodingError, VideoLimitError, VideoLimits


DEMO = "demo (moving shapes)"
# A Space is started without arguments: there a variable of that name, with spaces between the names, takes their place.
MODELS_VARIABLE = "VIVIT_MODELS"
METHODS = {"what speaks for the label": "gradient", "attention rollout": "rollout"}
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)
MOST_WINDOWS = 300  # of a timeline, so that a long video does not keep everyone else waiting
TOP_K = 5
# Beyond any camera for slow motion. What a short file claims to hold beyond that is a trick, and not worth reading.
MOST_FRAMES_PER_SECOND = 1000
COLOURS = ("#4f46e5", "#d97706", "#059669", "#db2777", "#0284c7", "#7c3aed", "#65a30d", "#dc2626")

CSS = """
.message { border-left: 4px solid var(--color-accent); border-radius: 4px; background: var(--block-background-fill); }
.message { padding: 10px 14px; overflow-wrap: anywhere; }
.message.error { border-color: #dc2626; background: #dc262618; }
#video video { max-height: 250px; }
#bar .track { position: relative; height: 26px; border-radius: 4px; background: var(--background-fill-secondary); }
#bar .track span { position: absolute; top: 0; bottom: 0; border-radius: 4px; box-shadow: inset -1px 0 #fff8; }
#bar .ends { display: flex; justify-content: space-between; font-size: 12px; opacity: 0.7; }
#bar .names { display: flex; flex-wrap: wrap; gap: 2px 14px; font-size: 13px; margin-top: 4px; }
#bar .names i { display: inline-block; width: 10px; height: 10px; border-radius: 2px; margin-right: 5px; }
"""

TOO_LARGE = (
    "{name} is too large: it has {megabytes} MB, and this page takes up to {limit} MB. Cut out the part that matters, "
    "or save it in a smaller size."
)
# In the browser, where a file that is too large need not be sent first; all that Gradio would say of it is "Error".
SCRIPT = """<script>
for (const kind of ["change", "drop"]) {
  window.addEventListener(kind, (event) => {
    const files = (kind === "drop" ? event.dataTransfer : event.target).files || [];
    const large = [...files].find((file) => file.size > %(limit)s * 1e6);
    if (!large) return;
    event.stopImmediatePropagation();
    event.preventDefault();
    if (kind === "change") event.target.value = "";
    const box = document.querySelector("#status .message");
    box.className = "message error";
    box.textContent = `%(text)s`;
  }, true);
}
</script>"""


class UserError(Exception):
    """Something that whoever uses the page can mend; its text is shown there."""


@dataclass(frozen=True)
class Clip:
    """An uploaded file within the limits of the page."""

    path: Path
    last_frame: float  # seconds, when it is shown
    frames_per_second: float  # on average
    summary: str


def check_clip(path: str | None, max_seconds: float, max_megabytes: float) -> Clip:
    """Raises UserError for a file that is missing, too large, too long or unreadable, with the reason."""
    if path is None:
        raise UserError("There is no video yet: upload a file or record one.")
    file = Path(path)
    megabytes = file.stat().st_size / 1e6
    if megabytes > max_megabytes:
        raise UserError(TOO_LARGE.format(name=file.name, megabytes=f"{megabytes:.1f}", limit=f"{max_megabytes:g}"))
    limits = VideoLimits(max_frames=max(1, round(max_seconds * MOST_FRAMES_PER_SECOND)))
    try:
        with VideoReader(path, limits=limits) as reader:
            count, times = reader.num_frames, reader.timestamps
            height, width = reader.frames_at([0], on_lost="repeat_last").shape[1:3]
    except VideoLimitError as error:
        raise UserError(f"{file.name} is too long or its pictures are too large: {error.reason}.") from error
    except VideoDecodingError as error:
        raise UserError(
            f"Cannot read {file.name}: {error.reason}. It may be damaged, or hold no picture at all. If it plays "
            "elsewhere, save it as MP4 (H.264) and upload that."
        ) from error
    # A frame is shown until the next one comes; the last one as long as the others on average.
    seconds = float(times[-1]) * count / (count - 1) if count > 1 else 0.0
    if seconds > max_seconds:
        raise UserError(
            f"{file.name} is too long: it lasts {spoken(seconds)}, and this page takes up to {spoken(max_seconds)}. "
            "Cut out the part that matters."
        )
    summary = f"{file.name}: {seconds:.1f} seconds, {count} frame{'s' * (count > 1)} of {width} x {height}"
    return Clip(file, float(times[-1]), count / seconds if seconds else 0.0, summary)


def spoken(seconds: float) -> str:
    return f"{round(seconds, 1):g} seconds" if seconds < 120 else f"{round(seconds / 60, 1):g} minutes"


def check_model(name: str | None, offered: Sequence[str]) -> str:
    """The name of a model that may be loaded: one that the page offers, or a Hub id, but no folder of the server."""
    name = (name or "").strip()
    if not name:
        raise UserError("There is no model yet: choose one, or type its Hub id.")
    if name not in offered and (not HUB_ID.fullmatch(name) or os.path.exists(name)):
        raise UserError(f"{name!r} is no Hub id: choose a model of the list, or type one such as 'owner/name'.")
    return name


@lru_cache(maxsize=2)  # visitors can name any model; memory holds only so many
def load_model(name: str) -> tuple[Any, ViViTVideoProcessor]:
    """Model and processor of a folder or Hub id. No code that comes with them is run."""
    folder = demo_model_path() if name == DEMO else name
    try:
        model = ViViTForVideoClassification.from_pretrained(folder).eval()
        processor = ViViTVideoProcessor.from_pretrained(folder)
    except (OSError, ValueError, TypeError, KeyError, SafetensorError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"Cannot load the model {name!r}: {reason}") from error
    if not model.config.num_labels:
        raise UserError(f"The model {name!r} has no classifier: choose one that was trained on labels.")
    return model.to("cuda" if torch.cuda.is_available() else "cpu"), processor


def looks_at_once(processor: ViViTVideoProcessor) -> bool:
    """Whether a clip is frames from all of the video, so that there is one clip and no when."""
    return processor.frame_sampling == "uniform"


def num_clips(processor: ViViTVideoProcessor) -> int:
    """Parts of the video whose scores are averaged."""
    return 1 if looks_at_once(processor) else 4


def classify(model: Any, processor: ViViTVideoProcessor, path: Path) -> dict[str, float]:
    """The likeliest labels and their probabilities."""
    [prediction] = predict_videos(model, processor, [path], num_clips=num_clips(processor))
    if prediction.probabilities is None:
        raise UserError(str(prediction.error))
    scores = zip(LabelMap.from_config(model.config).names, prediction.probabilities.tolist(), strict=True)
    return dict(sorted(scores, key=lambda one: -one[1])[:TOP_K])


def timeline(model: Any, processor: ViViTVideoProcessor, clip: Clip) -> list[Segment]:
    """What happens when; in a long video with larger steps from window to window."""
    if looks_at_once(processor):
        return []
    rate = processor.frames_per_second or clip.frames_per_second / processor.frame_stride
    widest = math.ceil(clip.last_frame * rate / MOST_WINDOWS)
    return video_timeline(model, processor, clip.path, hop=max(StreamingClassifier(model, processor).hop, widest))


def timeline_bar(segments: Sequence[Segment]) -> str:
    """The segments as a coloured bar with a legend, in HTML."""
    if not segments:
        return ""
    seconds = max(segments[-1].end, 1e-3)
    names = list(dict.fromkeys(segment.label for segment in segments))
    colour = {name: COLOURS[place % len(COLOURS)] for place, name in enumerate(names)}
    parts = "".join(
        f'<span style="left:{100 * one.start / seconds:.2f}%;width:{100 * (one.end - one.start) / seconds:.2f}%;'
        f'background:{colour[one.label]}" title="{html.escape(f"{one.label} {one.score:.2f}")}"></span>'
        for one in segments
    )
    legend = "".join(
        f'<span><i style="background:{colour[name]}"></i>{html.escape(name)}</span>' for name in names[:TOP_K]
    )
    ends = f"<span>0 s</span><span>{seconds:.1f} s</span>"
    return f'<div class="track">{parts}</div><div class="ends">{ends}</div><div class="names">{legend}</div>'


def box(text: str, state: str = "busy") -> str:
    """The text of the status box, "busy", "done" or "error"; whatever a file or a model is called, it is text."""
    role = "alert" if state == "error" else "status"
    return f'<div class="message {state}" role="{role}">{html.escape(text)}</div>'


def build_page(models: Sequence[str], max_seconds: float, max_megabytes: float) -> gr.Blocks:
    with gr.Blocks(title="ViViT video classification", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.Markdown(
            "# What happens in this video?\n"
            "A video transformer (ViViT) names it, says when it happens, and shows where it looked. "
            f"Clips can have up to {spoken(max_seconds)} and {max_megabytes:g} MB."
        )
        with gr.Row():
            with gr.Column(min_width=320):
                video = gr.Video(
                    label="Video",
                    show_label=False,  # it would lie over the video
                    sources=["upload", "webcam"],
                    height=320,
                    include_audio=True,  # taking the sound out would need the ffmpeg program
                    webcam_options=gr.WebcamOptions(mirror=False),  # the model sees left and right as the camera does
                    elem_id="video",
                )
                with gr.Row():
                    model = gr.Dropdown(
                        [*models, DEMO],
                        value=[*models, DEMO][0],
                        allow_custom_value=True,
                        label="Model",
                        info="Choose one, or type a Hub id.",
                        min_width=200,
                        elem_id="model",
                    )
                    method = gr.Radio(
                        list(METHODS),
                        value=next(iter(METHODS)),
                        label="Heat map",
                        info="What its colours show.",
                        min_width=200,
                        elem_id="method",
                    )
                button = gr.Button("Classify", variant="primary", elem_id="classify")
                gr.Examples(
                    sorted([str(path)] for path in Path(__file__).parent.glob("clips/*.mp4")),
                    [video],
                    label="For the demo model: shapes that move along a diagonal",
                    cache_examples=False,
                )
            with gr.Column(min_width=320):
                status = gr.HTML(box("Upload or record a clip, then press Classify.", "done"), elem_id="status")
                labels = gr.Label(num_top_classes=TOP_K, label="Labels of the whole video", elem_id="labels")
                with gr.Column(visible=False) as times:
                    gr.Markdown("### What happens when")
                    bar = gr.HTML(elem_id="bar")
                    table = gr.Dataframe(
                        headers=["start (s)", "end (s)", "label", "score"],
                        datatype="str",
                        interactive=False,
                        max_height=220,
                        show_label=False,
                        buttons=[],
                        elem_id="timeline",
                    )
        with gr.Column(visible=False) as seen:
            gr.Markdown("### What the model saw\nThe clip from the middle of the video, and where the model looked.")
            with gr.Row():
                picture = {"type": "filepath", "show_label": False, "height": 460}
                moving = gr.Image(
                    **picture, elem_id="overlay", buttons=[], min_width=280, alt_text="the clip with a heat map over it"
                )
                sheet = gr.Image(
                    **picture, elem_id="sheet", buttons=["fullscreen"], scale=2, alt_text="frames, moments and labels"
                )

        def run(path: str | None, name: str | None, looks: str) -> Iterator[dict[Any, Any]]:
            """Fills the page part by part."""
            hidden = {times: gr.Column(visible=False), seen: gr.Column(visible=False)}
            yield {**hidden, labels: None, status: box("Reading the video ...")}
            try:
                clip = check_clip(path, max_seconds, max_megabytes)
                name = check_model(name, [*models, DEMO])
                yield {status: box(f"{clip.summary}. Loading the model ...")}
                network, processor = load_model(name)
                yield {status: box(f"{clip.summary}. Classifying ...")}
                filled: dict[Any, Any] = {labels: classify(network, processor, clip.path)}
                yield filled
                segments = timeline(network, processor, clip)
                rows = [[f"{one.start:.2f}", f"{one.end:.2f}", one.label, f"{one.score:.3f}"] for one in segments]
                filled |= {times: gr.Column(visible=bool(segments)), bar: timeline_bar(segments), table: rows}
                yield filled
                pixel_values = processor(clip.path, num_clips=1, num_crops=1)["pixel_values"]
                pixel_values = pixel_values.to(network.device, network.dtype)
                explanation = explain_clip(network, processor, pixel_values, method=METHODS[looks], top_k=TOP_K)
                with tempfile.TemporaryDirectory() as folder:
                    clip_path, sheet_path = (
                        str(save_explanation(Path(folder, name), explanation)) for name in ("seen.gif", "sheet.png")
                    )
                    protocol = describe_views(processor, num_clips(processor), num_crops=1)
                    # Programs that call this page get the last part alone. The pictures are copied before Gradio asks
                    # for what comes after it.
                    yield filled | {
                        seen: gr.Column(visible=True),
                        moving: clip_path,
                        sheet: sheet_path,
                        status: box(f"{clip.summary}. The labels are from {protocol}.", "done"),
                    }
            except (UserError, VideoDecodingError, ValueError) as error:
                yield {status: box(str(error), "error")}
            except Exception as error:
                logging.exception("A video could not be classified.")
                text = f"This should not have happened: {type(error).__name__}. The log of the server tells more."
                yield {status: box(text, "error")}

        outputs = [status, labels, times, bar, table, seen, moving, sheet]
        button.click(run, [video, model, method], outputs, api_name="classify", show_progress="minimal")
    return page.queue(max_size=32)


def main() -> None:
    parser = argparse.ArgumentParser(description="A page that classifies uploaded or recorded video clips.")
    parser.add_argument(
        "--model",
        action="append",
        help=f"a folder or Hub id to choose from besides the demo model, may be repeated (default: ${MODELS_VARIABLE})",
    )
    parser.add_argument("--max-seconds", type=float, default=600.0, help="what a clip may last (default: 600)")
    parser.add_argument("--max-megabytes", type=float, default=200.0, help="what a file may have (default: 200)")
    parser.add_argument("--host", help="address to listen on (default: this machine only; in a Space, all)")
    parser.add_argument("--port", type=int, help="(default: the first free one from 7860 on)")
    arguments = parser.parse_args()
    for name in ("max_seconds", "max_megabytes"):
        if not getattr(arguments, name) > 0:
            parser.error(f"--{name.replace('_', '-')} must be above 0, got {getattr(arguments, name):g}")
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    models = arguments.model or os.environ.get(MODELS_VARIABLE, "").split()
    limit = f"{arguments.max_megabytes:g}"
    text = TOO_LARGE.format(name="${large.name}", megabytes="${(large.size / 1e6).toFixed(1)}", limit=limit)
    system = ("ui-sans-serif", "system-ui", "sans-serif")
    build_page(models, arguments.max_seconds, arguments.max_megabytes).launch(
        server_name=arguments.host,
        server_port=arguments.port,
        max_file_size=round(arguments.max_megabytes * 1e6),
        theme=gr.themes.Soft(font=system, font_mono=("ui-monospace", "monospace")),
        css=CSS,
        head=SCRIPT % {"limit": limit, "text": text},
        footer_links=[],
        ssr_mode=False,  # needs Node.js
    )


if __name__ == "__main__":
    main()
