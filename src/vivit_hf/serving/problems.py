"""The reasons for which a server gives no labels, as HTTP statuses and JSON."""

from fastapi.responses import JSONResponse


class Problem(Exception):
    """
    The reason why a request gets no labels.

    Args:
        status: the HTTP status.
        text: the value, what was expected, and the way out; nothing about the server.
        file: the name of the video that the text is about.
        retry_after: seconds after which it is worth trying again.
    """

    def __init__(self, status: int, text: str, *, file: str | None = None, retry_after: int | None = None):
        super().__init__(text)
        self.status, self.text, self.file, self.retry_after = status, text, file, retry_after

    def response(self) -> JSONResponse:
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        about = {} if self.file is None else {"file": self.file}
        return JSONResponse({**about, "error": self.text}, self.status, headers)
