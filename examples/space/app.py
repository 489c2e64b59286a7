"""A page that classifies a clip and shows its timeline and where the model looked. See examples/app.py.

It works offline: the page loads nothing from other hosts and sends no statistics.
"""

import argparse
import html
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr


sys.path.insert(0, str(Path(__file__).resolve().parent))  # jobs.py, and in a Space the package

from jobs import DEMO, TOO_LARGE, TOP_K, Job, UserError, Worker, spoken

from vivit_hf.inference import Segment


# A Space starts without arguments: these variables replace --model (names separated by spaces) and --only-listed (1).
MODELS_VARIABLE, ONLY_LISTED_VARIABLE = "VIVIT_MODELS", "VIVIT_ONLY_LISTED"
METHODS = {"what speaks for the label": "gradient", "attention rollout": "rollout"}
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)
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

# Refuses large files in the browser, before they are sent. Gradio itself would only say "Error".
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


def check_model(name: Any, offered: Sequence[str], only_listed: bool = False) -> str:
    """Return the name of a model that may be loaded: one of the list, or a Hub id, but no folder of the server."""
    if name is not None and not isinstance(name, str):
        raise UserError(f"The model must be given by its name, as text, not by a {type(name).__name__}.")
    name = (name or "").strip()
    if not name:
        raise UserError("There is no model yet: choose one, or type a Hub id.")
    if name in offered:
        return name
    if only_listed:
        raise UserError(f"{name!r} is not on the list of models, and this page accepts no others.")
    if not HUB_ID.fullmatch(name) or os.path.exists(name):
        raise UserError(f"{name!r} is not a Hub id: choose a model from the list, or type an id such as 'owner/name'.")
    return name


def timeline_bar(segments: Sequence[Segment]) -> str:
    """Return the segments as a coloured bar with a legend, in HTML."""
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
    """Return the status box in HTML, in the state "busy", "done" or "error". The text is escaped."""
    role = "alert" if state == "error" else "status"
    return f'<div class="message {state}" role="{role}">{html.escape(text)}</div>'


def add_inputs(models: Sequence[str], only_listed: bool) -> tuple[list[Any], gr.Button]:
    """Add the inputs, video, model and heat map, and the button."""
    video = gr.Video(
        label="Video",
        show_label=False,  # it would cover the video
        sources=["upload", "webcam"],
        height=320,
        include_audio=True,  # removing the sound would need the ffmpeg program
        webcam_options=gr.WebcamOptions(mirror=False),  # the model sees left and right as the camera does
        elem_id="video",
    )
    with gr.Row():
        model = gr.Dropdown(
            list(models),
            value=models[0],
            allow_custom_value=not only_listed,
            label="Model",
            info="Choose one." if only_listed else "Choose one, or type a Hub id.",
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
    return [video, model, method], button


def add_answer() -> dict[str, Any]:
    """Add status, labels and the timeline, which is hidden until there is one."""
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
    return {"status": status, "labels": labels, "times": times, "bar": bar, "table": table}


def add_pictures() -> dict[str, Any]:
    """Add the pictures of the explained clip, which are hidden until they are drawn."""
    with gr.Column(visible=False) as seen:
        gr.Markdown("### What the model saw")
        caption = gr.HTML(elem_id="caption")
        with gr.Row():
            picture = {"type": "filepath", "show_label": False, "height": 460}
            moving = gr.Image(
                **picture, elem_id="overlay", buttons=[], min_width=280, alt_text="the clip with a heat map over it"
            )
            sheet = gr.Image(
                **picture, elem_id="sheet", buttons=["fullscreen"], scale=2, alt_text="frames, moments and labels"
            )
    return {"seen": seen, "caption": caption, "moving": moving, "sheet": sheet}


def updates(part: dict[str, Any]) -> dict[str, Any]:
    """Return what one part of a job's answer changes on the page, by the names of the outputs."""
    if "error" in part:
        return {"status": box(part["error"], "error")}
    if "labels" in part:
        return {"labels": part["labels"]}
    if "segments" in part:
        segments = part["segments"]
        rows = [[f"{one.start:.2f}", f"{one.end:.2f}", one.label, f"{one.score:.3f}"] for one in segments]
        return {"times": gr.Column(visible=bool(segments)), "bar": timeline_bar(segments), "table": rows}
    if "pictures" in part:
        moving, sheet = part["pictures"]
        shown = {"seen": gr.Column(visible=True), "caption": html.escape(part["caption"])}
        return {**shown, "moving": moving, "sheet": sheet, "status": box(part["status"], "done")}
    return {"status": box(part["status"])} if "status" in part else {}


def build_page(
    models: Sequence[str],
    max_seconds: float,
    max_megabytes: float,
    job_seconds: float = 120.0,
    only_listed: bool = False,
) -> gr.Blocks:
    worker, offered = Worker(job_seconds), [*models, DEMO]
    with gr.Blocks(title="ViViT video classification", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.Markdown(
            "# What happens in this video?\n"
            "A video transformer (ViViT) names it, says when it happens, and shows where it looked. "
            f"Clips can have up to {spoken(max_seconds)} and {max_megabytes:g} MB."
        )
        with gr.Row():
            with gr.Column(min_width=320):
                inputs, button = add_inputs(offered, only_listed)
            with gr.Column(min_width=320):
                answer = add_answer()
        outputs = {**answer, **add_pictures()}

        def run(path: str | None, name: Any, looks: Any) -> Iterator[dict[Any, Any]]:
            """Fill the page part by part. Every part repeats the ones before: API clients only get the last one."""
            hidden = {outputs[column]: gr.Column(visible=False) for column in ("times", "seen")}
            yield {**hidden, outputs["labels"]: None, outputs["status"]: box("Reading the video ...")}
            try:
                name = check_model(name, offered, only_listed)
                if not isinstance(looks, str) or looks not in METHODS:
                    raise UserError(f"The heat map is one of: {', '.join(METHODS)}.")
            except UserError as error:
                yield {outputs["status"]: box(str(error), "error")}
                return
            filled: dict[Any, Any] = {}
            with tempfile.TemporaryDirectory() as folder:  # Gradio copies the pictures before it asks for the next part
                for part in worker.run(Job(path, name, METHODS[looks], folder, max_seconds, max_megabytes)):
                    filled |= {outputs[key]: value for key, value in updates(part).items()}
                    if "end" not in part:
                        yield filled

        button.click(run, inputs, list(outputs.values()), api_name="classify", show_progress="minimal")
    return page.queue(max_size=32)


def main() -> None:
    parser = argparse.ArgumentParser(description="A page that classifies uploaded or recorded video clips.")
    parser.add_argument(
        "--model",
        action="append",
        help=f"a folder or Hub id to offer besides the demo model, can be repeated (default: ${MODELS_VARIABLE})",
    )
    parser.add_argument("--max-seconds", type=float, default=600.0, help="longest clip (default: 600)")
    parser.add_argument("--max-megabytes", type=float, default=200.0, help="largest file (default: 200)")
    parser.add_argument("--job-seconds", type=float, default=120.0, help="deadline of one answer (default: 120)")
    parser.add_argument(
        "--only-listed",
        action="store_true",
        default=os.environ.get(ONLY_LISTED_VARIABLE, "") not in ("", "0"),
        help=f"load no other models from the Hub (default: ${ONLY_LISTED_VARIABLE})",
    )
    parser.add_argument("--host", help="address to listen on (default: this machine only; in a Space, all)")
    parser.add_argument("--port", type=int, help="(default: the first free one from 7860 on)")
    arguments = parser.parse_args()
    for name in ("max_seconds", "max_megabytes", "job_seconds"):
        if not getattr(arguments, name) > 0:
            parser.error(f"--{name.replace('_', '-')} must be above 0, got {getattr(arguments, name):g}")
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    models = arguments.model or os.environ.get(MODELS_VARIABLE, "").split()
    limit = f"{arguments.max_megabytes:g}"
    text = TOO_LARGE.format(name="${large.name}", megabytes="${(large.size / 1e6).toFixed(1)}", limit=limit)
    system = ("ui-sans-serif", "system-ui", "sans-serif")
    page = build_page(
        models, arguments.max_seconds, arguments.max_megabytes, arguments.job_seconds, arguments.only_listed
    )
    page.launch(
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
