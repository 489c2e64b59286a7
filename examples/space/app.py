"""A page that says what happens in a video, how sure that is, when, and where the model looked. See examples/app.py.

It works offline: the page loads nothing from other hosts and sends no statistics.
"""

import argparse
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gradio as gr


sys.path.insert(0, str(Path(__file__).resolve().parent))  # the other files, and in a Space the package

from jobs import DEMO, TOO_LARGE, Job, Limits, UserError, Worker, spoken
from story import CSS, box, matches_html, verdict_html, what_html, when_html, where_html


# A Space starts without arguments: these variables replace --model, --features and --show-from (names separated by
# spaces), --features-model, and --only-listed (1).
MODELS_VARIABLE, ONLY_LISTED_VARIABLE = "VIVIT_MODELS", "VIVIT_ONLY_LISTED"
FEATURES_VARIABLE, FEATURES_MODEL_VARIABLE, SHOW_VARIABLE = "VIVIT_FEATURES", "VIVIT_FEATURES_MODEL", "VIVIT_SHOW_FROM"
CHECK_SECONDS = 600.0  # for the model of the features, when the page starts
METHODS = {"what speaks for the label": "gradient", "attention rollout": "rollout"}
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)

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
    for (const box of document.querySelectorAll(".status .message")) {
      box.className = "message error";
      box.textContent = `%(text)s`;
    }
  }, true);
}
</script>"""


@dataclass(frozen=True)
class Library:
    """Features to search, and the folders whose videos may be shown; see `Job`."""

    features: tuple[str, ...]
    model: str | None
    folders: tuple[str, ...]

    def job(self, task: str, path: str | None, limits: Limits) -> Job:
        fields = {"features": self.features, "features_model": self.model, "folders": self.folders}
        return Job(task, path, (), limits, **fields)


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


def add_video() -> gr.Video:
    """Add the video, which all tabs share, and the clips to try."""
    video = gr.Video(
        label="Video",
        show_label=False,  # it would cover the video
        sources=["upload", "webcam"],
        include_audio=True,  # removing the sound would need the ffmpeg program
        webcam_options=gr.WebcamOptions(mirror=False),  # the model sees left and right as the camera does
        elem_id="video",
    )
    gr.Examples(
        sorted([str(path)] for path in Path(__file__).parent.glob("clips/*.mp4")),
        [video],
        label="Shapes for the demo model",
        cache_examples=False,
    )
    return video


def add_model(
    models: Sequence[str], only_listed: bool, label: str = "Model", elem_id: str = "model", chosen: int = 0
) -> gr.Dropdown:
    return gr.Dropdown(
        list(models),
        value=models[chosen],
        allow_custom_value=not only_listed,
        label=label,
        info="Choose one." if only_listed else "Choose one, or type a Hub id.",
        min_width=200,
        elem_id=elem_id,
    )


def add_status(text: str, elem_id: str) -> gr.HTML:
    return gr.HTML(box(text, "done"), elem_id=elem_id, elem_classes=["status"])


class ClassifyTab:
    """What, how sure, when and where, from top to bottom."""

    def __init__(self, models: Sequence[str], only_listed: bool):
        self.models, self.only_listed = models, only_listed
        with gr.Row():
            model = add_model(models, only_listed)
            method = gr.Radio(
                list(METHODS),
                value=next(iter(METHODS)),
                label="Heat map",
                info="What its colours show.",
                min_width=200,
                elem_id="method",
            )
        self.inputs = [model, method]
        self.button = gr.Button("Classify", variant="primary", elem_id="classify")
        status = add_status("Upload or record a clip, then press Classify.", "status")
        data = gr.JSON(visible=False)  # for programs
        what, when = gr.HTML(elem_id="labels"), gr.HTML(elem_id="timeline")
        with gr.Column(visible=False) as seen:
            where = gr.HTML(elem_id="caption")
            with gr.Row():
                picture = {"type": "filepath", "show_label": False}
                moving = gr.Image(
                    **picture, elem_id="overlay", buttons=[], min_width=240, alt_text="the clip with a heat map over it"
                )
                sheet = gr.Image(
                    **picture,
                    elem_id="sheet",
                    buttons=["fullscreen"],
                    min_width=280,
                    scale=2,
                    alt_text="frames, moments and labels",
                )
        parts = {"status": status, "data": data, "what": what, "when": when, "seen": seen, "where": where}
        self.outputs: dict[str, Any] = {**parts, "moving": moving, "sheet": sheet}

    def empty(self) -> dict[str, Any]:
        return {"data": None, "what": "", "when": "", "seen": gr.Column(visible=False)}

    def job(self, path: str | None, limits: Limits, folder: str, name: Any, looks: Any) -> Job:
        name = check_model(name, self.models, self.only_listed)
        if not isinstance(looks, str) or looks not in METHODS:
            raise UserError(f"The heat map is one of: {', '.join(METHODS)}.")
        return Job("classify", path, (name,), limits, METHODS[looks], folder)

    def updates(self, part: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        if "what" in part:
            data |= {**part["what"], "sure": part["sure"]}
            return {"data": dict(data), "what": what_html(part["what"], part["sure"])}
        if "segments" in part:
            data["segments"] = part["segments"]
            return {"data": dict(data), "when": when_html(part["segments"], part["note"])}
        if "pictures" in part:
            moving, sheet = part["pictures"]
            shown = {"seen": gr.Column(visible=True), "where": where_html(part["caption"])}
            return {**shown, "moving": moving, "sheet": sheet, "status": box(part["status"], "done")}
        return {}


class CompareTab:
    """The labels of two models side by side."""

    def __init__(self, models: Sequence[str], only_listed: bool):
        self.models, self.only_listed = models, only_listed
        with gr.Row():
            self.inputs = [
                add_model(models, only_listed, f"{place} model", f"model-{number}", number % len(models))
                for number, place in enumerate(("First", "Second"))
            ]
        self.button = gr.Button("Compare", variant="primary", elem_id="compare")
        status = add_status("Upload or record a clip, choose two models, then press Compare.", "compare-status")
        data = gr.JSON(visible=False)  # for programs
        verdict = gr.HTML(elem_id="verdict")
        with gr.Row():
            sides = []
            for number in range(2):
                with gr.Column(min_width=260):
                    sides.append(gr.HTML(elem_id=f"side-{number}"))
        self.outputs: dict[str, Any] = {"status": status, "data": data, "verdict": verdict}
        self.outputs |= {"side-0": sides[0], "side-1": sides[1]}

    def empty(self) -> dict[str, Any]:
        return {"data": None, "verdict": "", "side-0": "", "side-1": ""}

    def job(self, path: str | None, limits: Limits, folder: str, *names: Any) -> Job:
        chosen = tuple(check_model(name, self.models, self.only_listed) for name in names)
        if chosen[0] == chosen[1]:
            raise UserError("These are the same model: choose two different ones.")
        return Job("compare", path, chosen, limits)

    def updates(self, part: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        if "side" in part:
            data[part["name"]] = {**part["what"], "sure": part["sure"], "seconds": part["seconds"]}
            return {f"side-{part['side']}": what_html(part["what"], part["sure"], part["name"])}
        if "verdict" in part:
            data["verdict"] = part["verdict"]
            status = box(part["status"], "done")
            return {"data": dict(data), "verdict": verdict_html(part["verdict"]), "status": status}
        return {}


class SearchTab:
    """The videos of stored features that are most like the upload."""

    def __init__(self, library: Library):
        self.library, self.inputs = library, []
        self.button = gr.Button("Search", variant="primary", elem_id="search")
        status = add_status("Upload or record a clip, then press Search.", "search-status")
        self.outputs = {"status": status, "data": gr.JSON(visible=False), "matches": gr.HTML(elem_id="matches")}

    def empty(self) -> dict[str, Any]:
        return {"data": None, "matches": ""}

    def job(self, path: str | None, limits: Limits, folder: str) -> Job:
        return self.library.job("search", path, limits)

    def updates(self, part: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
        if "matches" not in part:
            return {}
        rows = [{name: value for name, value in one.items() if name != "picture"} for one in part["matches"]]
        return {"data": rows, "matches": matches_html(part["matches"]), "status": box(part["status"], "done")}


def connect(tab: Any, video: gr.Video, worker: Worker, limits: Limits, api_name: str) -> None:
    """Let the button of a tab run its job and fill its outputs."""

    def run(path: str | None, *choices: Any) -> Iterator[dict[Any, Any]]:
        """Fill the tab part by part. Every part repeats the ones before: API clients only get the last one."""
        filled: dict[Any, Any] = {tab.outputs[key]: value for key, value in tab.empty().items()}
        yield {**filled, tab.outputs["status"]: box("Reading the video ...")}
        filled, data = {}, {}
        with tempfile.TemporaryDirectory() as folder:  # Gradio copies the pictures before it asks for the next part
            try:
                job = tab.job(path, limits, folder, *choices)
            except UserError as error:
                yield {tab.outputs["status"]: box(str(error), "error")}
                return
            for part in worker.run(job):
                if "end" in part:
                    return
                if "error" in part:
                    found = {"status": box(part["error"], "error")}
                else:
                    found = {"status": box(part["status"])} if "status" in part else {}
                    found |= tab.updates(part, data)
                filled |= {tab.outputs[key]: value for key, value in found.items()}
                yield filled

    tab.button.click(
        run,
        [video, *tab.inputs],
        list(tab.outputs.values()),
        api_name=api_name,
        show_progress="minimal",
        concurrency_id="worker",  # one job at a time, from all tabs
    )


def build_page(
    models: Sequence[str], worker: Worker, limits: Limits, only_listed: bool = False, library: Library | None = None
) -> gr.Blocks:
    offered = [*models, DEMO]
    with gr.Blocks(title="ViViT video classification", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.Markdown(
            "# What happens in this video?\n"
            "A video transformer (ViViT) says what happens, how sure it is, when it happens, and where it looked. "
            f"Clips can have up to {spoken(limits.max_seconds)} and {limits.max_megabytes:g} MB."
        )
        with gr.Row():
            with gr.Column(min_width=300, scale=2, elem_id="inputs"):
                video = add_video()
            with gr.Column(min_width=300, scale=3), gr.Tabs():
                with gr.Tab("Classify", id="classify"):
                    connect(ClassifyTab(offered, only_listed), video, worker, limits, "classify")
                if len(offered) > 1 or not only_listed:
                    with gr.Tab("Compare", id="compare"):
                        connect(CompareTab(offered, only_listed), video, worker, limits, "compare")
                if library is not None:
                    with gr.Tab("Search by video", id="search"):
                        connect(SearchTab(library), video, worker, limits, "search")
    return page.queue(max_size=32)


def parse_arguments() -> argparse.Namespace:
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
    parser.add_argument(
        "--features",
        action="append",
        metavar="FILE",
        help=f"features of `vivit-hf embed` for a tab that searches them, can be repeated (default: "
        f"${FEATURES_VARIABLE})",
    )
    parser.add_argument(
        "--features-model",
        metavar="MODEL",
        default=os.environ.get(FEATURES_MODEL_VARIABLE) or None,
        help=f"where the model of the features is now (default: as they say, or ${FEATURES_MODEL_VARIABLE})",
    )
    parser.add_argument(
        "--show-from",
        action="append",
        metavar="FOLDER",
        help=f"show pictures of results in this folder, can be repeated (default: names only, or ${SHOW_VARIABLE})",
    )
    parser.add_argument("--host", help="address to listen on (default: this machine only; in a Space, all)")
    parser.add_argument("--port", type=int, help="(default: the first free one from 7860 on)")
    arguments = parser.parse_args()
    for name in ("max_seconds", "max_megabytes", "job_seconds"):
        if not getattr(arguments, name) > 0:
            parser.error(f"--{name.replace('_', '-')} must be above 0, got {getattr(arguments, name):g}")
    for name, variable in (("model", MODELS_VARIABLE), ("features", FEATURES_VARIABLE), ("show_from", SHOW_VARIABLE)):
        setattr(arguments, name, getattr(arguments, name) or os.environ.get(variable, "").split())
    if missing := [folder for folder in arguments.show_from if not os.path.isdir(folder)]:
        parser.error(f"--show-from {missing[0]}: there is no such folder")
    if not arguments.features and (arguments.show_from or arguments.features_model):
        parser.error("--show-from and --features-model need --features")
    return arguments


def check_files(features: Sequence[str]) -> None:
    """End the program with the reason if files hold no features."""
    from vivit_hf.inference.feature_files import read_settings

    for path in features:
        try:
            read_settings(path)
        except (OSError, ValueError) as error:
            sys.exit(f"--features {path}: {error}")


def warm_up(worker: Worker, library: Library | None, limits: Limits) -> None:
    """Load torch before the first visitor comes, and the model of the features, or print why it cannot be used."""
    worker.start()
    if library is not None:
        for part in worker.run(library.job("check features", None, replace(limits, job_seconds=CHECK_SECONDS))):
            if "error" in part:
                print(part["error"], file=sys.stderr)


def main() -> None:
    arguments = parse_arguments()
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    limits = Limits(arguments.max_seconds, arguments.max_megabytes, arguments.job_seconds)
    limit = f"{limits.max_megabytes:g}"
    text = TOO_LARGE.format(name="${large.name}", megabytes="${(large.size / 1e6).toFixed(1)}", limit=limit)
    system = ("ui-sans-serif", "system-ui", "sans-serif")
    worker = Worker()
    library = None
    if arguments.features:
        check_files(arguments.features)
        library = Library(tuple(arguments.features), arguments.features_model, tuple(arguments.show_from))
    page = build_page(arguments.model, worker, limits, arguments.only_listed, library)
    page.launch(
        server_name=arguments.host,
        server_port=arguments.port,
        max_file_size=round(limits.max_megabytes * 1e6),
        theme=gr.themes.Soft(font=system, font_mono=("ui-monospace", "monospace")),
        head=f"<style>{CSS}</style>" + SCRIPT % {"limit": limit, "text": text},  # `css` would reach less of the page
        footer_links=[],
        ssr_mode=False,  # needs Node.js
        prevent_thread_lock=True,
    )
    warm_up(worker, library, limits)
    page.block_thread()


if __name__ == "__main__":
    main()
