"""The HTTP interface, as a FastAPI application."""

import asyncio
import logging
import math
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Annotated, Any

import anyio
from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from .. import __version__
from ..inference.prediction import VideoPrediction, prediction_row
from ..inference.views import describe_views
from .metrics import Metrics
from .predictor import Job, Predictor
from .problems import Problem
from .receiving import discard, receive_video
from .serving_limits import ServingLimits


logger = logging.getLogger(__name__)

# The status under which metrics count clients that left; nobody gets to see it.
_GONE = 499
_DESCRIPTION = """
Labels of videos. Send a file, or the address of one. Each answer: {views}.

The content decides whether a file is a video. Its content type is not trusted; the end of its name is a hint.
"""


class Label(BaseModel):
    """A label, with its score from 0 to 1 (a value in a regression), and its group if the model has several."""

    label: str
    score: float
    group: str | None = None


class Answer(BaseModel):
    """The likeliest labels of a video, the best first: what `vivit-hf classify --json` prints for it."""

    file: str
    unknown: bool | None = None
    predictions: list[Label]


class Refusal(BaseModel):
    """The reason why there are no labels, and what can be done."""

    error: str
    file: str | None = None


_REFUSALS = {
    400: "The form cannot be read.",
    408: "The body arrives too slowly.",
    413: "The body or the download is too large.",
    415: "The content type is neither a form nor JSON.",
    422: "This is no video that can be read, or it is over the limits; or a parameter is wrong.",
    429: "This client has too many requests in progress; see Retry-After.",
    500: "An error of the server.",
    503: "The server has too many requests in progress, or ends; see Retry-After.",
    504: "There was no answer before the deadline.",
    507: "The server has no room for the file.",
}
_VIDEO_FORM = {"type": "object", "required": ["video"], "properties": {"video": {"type": "string", "format": "binary"}}}
_ADDRESS = {"type": "object", "required": ["url"], "properties": {"url": {"type": "string", "format": "uri"}}}
_BODY = {
    "requestBody": {
        "required": True,
        "content": {"multipart/form-data": {"schema": _VIDEO_FORM}, "application/json": {"schema": _ADDRESS}},
    }
}


class Admission:
    """Counts the requests in progress, of everybody and of each client."""

    def __init__(self, limits: ServingLimits, metrics: Metrics):
        self._limits, self._gauge = limits, metrics.in_progress
        self._in_progress: Counter[str] = Counter()
        self._usual_seconds = 1.0

    def is_full(self) -> bool:
        return self._in_progress.total() >= self._limits.max_requests

    @contextmanager
    def admitted(self, client: str) -> Iterator[None]:
        """Count a request. Raises Problem if there are too many."""
        most_of_client = self._limits.max_requests_per_client
        if most_of_client is not None and self._in_progress[client] >= most_of_client:
            self._refuse(429, f"{self._in_progress[client]} requests of this client are in progress, the most allowed")
        if self.is_full():
            self._refuse(503, f"{self._limits.max_requests} requests are in progress, the most that this server takes")
        self._in_progress[client] += 1
        self._gauge.inc()
        begin = time.monotonic()
        try:
            yield
        finally:
            self._usual_seconds += 0.1 * (time.monotonic() - begin - self._usual_seconds)
            self._gauge.dec()
            self._in_progress[client] -= 1
            self._in_progress += Counter()  # drops clients without requests

    def _refuse(self, status: int, reason: str) -> None:
        seconds = math.ceil(max(1.0, self._usual_seconds))  # by then, those in progress are answered
        raise Problem(status, f"{reason}. Try again in {seconds} seconds.", retry_after=seconds)


def create_app(predictor: Predictor, limits: ServingLimits, metrics: Metrics, top_k: int = 5) -> FastAPI:
    """
    Return the application; its threads start and end with it.

    Args:
        top_k: labels per answer, unless a request says otherwise.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        predictor.start()
        yield
        await anyio.to_thread.run_sync(predictor.stop)

    averaged = "values" if predictor.label_map.is_regression else predictor.averaging
    views = describe_views(predictor.processor, **predictor.views, averaging=averaged)
    description = _DESCRIPTION.format(views=views)
    app = FastAPI(title="vivit-hf", version=__version__, description=description, lifespan=lifespan, redoc_url=None)
    admission = Admission(limits, metrics)
    responses: dict[int | str, dict[str, Any]] = {
        status: {"model": Refusal, "description": text} for status, text in _REFUSALS.items()
    }

    @app.post("/classify", response_model=Answer, responses=responses, openapi_extra=_BODY)
    async def classify(
        request: Request,
        top_k: Annotated[int, Query(ge=1, le=1000, description="Labels to return, of each group.")] = top_k,
    ) -> Response:
        """Label a video, with scores averaged over its views."""
        begin = time.monotonic()
        try:
            client = request.client.host if request.client else ""
            with admission.admitted(client):
                response = await _classified(request, predictor, limits, metrics, top_k)
        except Problem as problem:
            is_read = await discard(request)
            response = problem.response()
            if not is_read:
                response.headers["Connection"] = "close"
        except ClientDisconnect:
            response = Response(status_code=_GONE)
        except Exception as error:
            logger.exception("A request failed.")
            text = f"Unexpected error: {type(error).__name__}. See the log of the server."
            response = JSONResponse({"error": text}, 500)
        metrics.requests.labels("gone" if response.status_code == _GONE else str(response.status_code)).inc()
        metrics.seconds.observe(time.monotonic() - begin)
        return response

    _add_service_routes(app, predictor, admission, metrics)
    _add_error_handlers(app)
    return app


async def _classified(
    request: Request, predictor: Predictor, limits: ServingLimits, metrics: Metrics, top_k: int
) -> Response:
    begin = time.monotonic()
    deadline = begin + limits.deadline
    video, row = None, None
    with anyio.move_on_after(limits.deadline):
        video = await receive_video(request, limits, deadline)
        metrics.stage_seconds.labels("receive").observe(time.monotonic() - begin)
        job = Job(video.source, deadline)
        predictor.submit(job)
        prediction = await _result_of(job, request)
        row = prediction_row(video.name, prediction, predictor.label_map, top_k)
    if row is not None:
        return JSONResponse(row, 422 if "error" in row else 200)
    if video is None:
        raise Problem(
            408, f"The body took longer than {limits.deadline:g} seconds. Send a smaller file, or its address."
        )
    text = f"There was no answer after {limits.deadline:g} seconds. Try again, or send a smaller video."
    raise Problem(504, text, file=video.name)


async def _result_of(job: Job, request: Request) -> VideoPrediction:
    """Wait for the prediction. Raises ClientDisconnect if the client leaves before."""
    answer = asyncio.wrap_future(job.future)
    gone: asyncio.Future[Any] = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait([answer, gone], return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise ClientDisconnect
        return answer.result()
    finally:
        job.give_up()
        gone.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _add_service_routes(app: FastAPI, predictor: Predictor, admission: Admission, metrics: Metrics) -> None:
    @app.get("/health/live", tags=["service"])
    async def live() -> JSONResponse:
        """200 while the server can answer; after anything else, restart it."""
        is_alive = predictor.is_alive()
        return JSONResponse({"status": "alive" if is_alive else "dead"}, 200 if is_alive else 500)

    @app.get("/health/ready", tags=["service"])
    async def ready() -> JSONResponse:
        """200 while it takes videos; after 503, send them elsewhere."""
        is_ready = predictor.is_alive() and not admission.is_full()
        return JSONResponse({"status": "ready" if is_ready else "not ready"}, 200 if is_ready else 503)

    @app.get("/metrics", tags=["service"], response_class=PlainTextResponse)
    async def prometheus() -> Response:
        """Metrics in the format of Prometheus."""
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(RequestValidationError)
    async def wrong_parameter(_: Request, error: RequestValidationError) -> JSONResponse:
        one = error.errors()[0]
        name, text = ".".join(map(str, one["loc"][1:])), one["msg"]
        return JSONResponse({"error": f"{name}={str(one['input'])[:80]!r}: {text}. See /docs."}, 422)

    @app.exception_handler(HTTPException)
    async def other_status(_: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse({"error": f"{error.detail}. See /docs."}, error.status_code, error.headers)
