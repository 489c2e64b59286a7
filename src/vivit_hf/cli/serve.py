"""`vivit-hf serve`: the labels of videos over HTTP."""

import os
import socket
from dataclasses import fields
from typing import Annotated, Any, Literal

import typer

from ..data.escaping import counted
from . import options
from .output import fail, say


def _limit(text: str, **settings: Any) -> Any:
    return typer.Option(min=1, help=text, rich_help_panel="Limits", **settings)


def serve(
    context: typer.Context,
    model: options.Model = None,
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 for all of this machine.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen at; 0 for a free one.")] = 8000,
    top_k: Annotated[int, typer.Option(min=1, max=1000, help="Labels per answer, unless a request says more.")] = 5,
    num_clips: options.Clips = None,
    num_crops: options.Crops = None,
    batch_size: options.BatchSize = 32,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Threads that decode.", show_default="one per core, at most 8")
    ] = None,
    on_error: Annotated[
        Literal["warn", "skip"],
        typer.Option(help="For a damaged video: warn and repeat the frame before each lost one, or refuse it."),
    ] = "warn",
    device: options.Device = None,
    dtype: options.AnswersDtype = None,
    max_bytes: Annotated[int, _limit("Bytes of an upload or a download.")] = 100_000_000,
    max_duration: Annotated[float, _limit("Seconds that a video lasts.")] = 600.0,
    max_frames: Annotated[int, _limit("Frames of a video.")] = 36_000,
    max_pixels: Annotated[int, _limit("Pixels of a frame.")] = 4096 * 2304,
    max_decoded_pixels: Annotated[int, _limit("Pixels of all frames decoded for an answer.")] = 8_000_000_000,
    max_requests: Annotated[int, _limit("Requests in progress; 503 above.")] = 64,
    max_requests_per_client: Annotated[
        int | None, _limit("The same of one IP address; 429 above.", show_default="no limit")
    ] = None,
    deadline: Annotated[float, _limit("Seconds from the first byte to the answer; 504 after that.")] = 30.0,
    min_upload_rate: Annotated[int, _limit("Bytes per second of an upload after 5 seconds; 408 below.")] = 10_000,
    allow_private_addresses: options.PrivateAddresses = False,
) -> None:
    """
    Label the videos that clients send, or whose addresses they send, over HTTP.

    POST /classify answers with the JSON of `vivit-hf classify` for the same views; /docs describes it. /health/live,
    /health/ready and /metrics are for whoever runs the server. SIGTERM ends it after the requests in progress.

    Needs `pip install 'vivit-hf[serve]'`. Anybody who reaches the port is served: put a proxy in front for passwords
    and TLS.

    Example: vivit-hf serve --model my_vivit, then curl -F video=@holiday.mp4 http://127.0.0.1:8000/classify
    """
    try:
        from ..serving import Predictor, ServingLimits, create_app, run_server
        from ..serving.metrics import Metrics
    except ModuleNotFoundError as error:
        fail(f"`vivit-hf serve` needs {error.name}: pip install 'vivit-hf[serve]'.", code=2)

    # The other parameters have the names of its fields.
    limits = ServingLimits(**{one.name: context.params[one.name] for one in fields(ServingLimits)})
    listener = _bound(host, port)
    classifier, processor = options.load(model, device, dtype, allow_private_addresses=allow_private_addresses)
    processor.on_error = "repeat_last" if on_error == "warn" else "raise"
    views = options.views_of(processor, num_clips, num_crops)
    threads = options.workers_of(workers)
    metrics = Metrics()
    averaging = options.averaging_of(classifier.config, views)
    settings: dict[str, Any] = {**views, "averaging": averaging, "batch_size": batch_size, "num_decoders": threads}
    try:
        predictor = Predictor(classifier, processor, **settings, limits=limits, metrics=metrics)
    except ValueError as error:  # the processor cannot make these views, or the weights are damaged
        raise typer.BadParameter(str(error)) from error
    address = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
    name, decoders = model or "the demo model", counted(threads, "decoder")
    say(f"Serving {name} at {address}/classify with {decoders}; {address}/docs describes it.")
    run_server(create_app(predictor, limits, metrics, top_k), listener, deadline)


def _bound(host: str, port: int) -> socket.socket:
    """Return a socket for this address, which does not listen yet; exits with 2 if the address is wrong or taken."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        if os.name == "posix":  # elsewhere it lets two processes share a port
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        reason = error.strerror or error
        raise typer.BadParameter(
            f"cannot listen at {host!r}, port {port}: {reason}; choose others", param_hint="--host, --port"
        ) from error
    return listener
