"""Download of a video over http or https.

    address --split--> host --resolve--> IP addresses --check, connect--> response --redirect--> the next address
                                                                             \\--body--> temporary file

Addresses may come from strangers, and so may the servers behind them:

- One deadline covers everything: name lookups, connecting, TLS, headers, redirects and the body.
- Connections go to public IP addresses only, unless the caller allows others. A name is looked up once per connection,
  which then goes to the IP address that was checked, so that a second answer of the name server cannot lead elsewhere.
  Proxies are not used, because they would look names up themselves.
- Addresses with a user name or password are refused, and `redacted` keeps secrets out of messages.
"""

from __future__ import annotations

import contextlib
import http.client
import io
import ipaddress
import queue
import re
import socket
import ssl
import tempfile
import threading
import time
from collections.abc import Iterator
from typing import Any, BinaryIO, NamedTuple
from urllib.parse import quote, urljoin, urlsplit


MAX_REDIRECTS = 10
# Give up on an address or a silent server after this many seconds.
PATIENCE = 30.0

_CHUNK_BYTES = 1 << 16
_REDIRECTS = (301, 302, 303, 307, 308)
# The answers with all of a file. 206 has a part, although none was asked for.
_WHOLE = (200, 203)
_COMPRESSIONS = {"br", "compress", "deflate", "gzip", "x-compress", "x-gzip", "zstd"}
# Characters that a path or query keeps; "%" because they may be quoted already.
_SAFE = "!#$%&'()*+,/:;=?@[]~"
_GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")
# NAT64 translators connect to the IPv4 address in the last four bytes.
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address


class DownloadError(RuntimeError):
    """An address cannot be downloaded; the message is the reason, without the address."""


class DownloadLimitError(DownloadError):
    """A download that is too large or takes too long."""


class DownloadTimeoutError(DownloadLimitError):
    """A download that takes too long."""


class PrivateAddressError(DownloadError):
    """An address that leads to an IP address which is not public; the reason names that one."""


def redacted(address: str) -> str:
    """
    Return an address for messages, results and files, with "***" for the user name, password, query and fragment.

    Malformed addresses are redacted as well. Text that is not an address is returned unchanged.
    """
    match = re.fullmatch(r"([^/]*[A-Za-z0-9+.-]{2}:/+)([^/?#]*)([^?#]*)(.*)", address, re.DOTALL)
    if match is None:
        return address
    scheme, authority, path, query = match.groups()
    _, at, host = authority.rpartition("@")
    if at:
        authority = f"***@{host}"
    # With an unescaped "/", "?" or "#" in a password, nobody can tell where the secret ends.
    if "@" in path + query and (at or not re.fullmatch(r"(\[[^]]*\]|[^:]*)(:\d*)?", authority)):
        authority, path = "***", ""
    shown = scheme + authority + path + (f"{query[0]}***" if query else "")
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in shown)


def is_public(address: IPAddress) -> bool:
    """Return whether an IP address is public, and so is the IPv4 address it stands for, if any."""
    if isinstance(address, ipaddress.IPv4Address):
        return address.is_global and not (address.is_multicast or address.is_reserved)
    inner = address.ipv4_mapped or address.sixtofour
    if inner is None and address in _NAT64:
        inner = ipaddress.IPv4Address(address.packed[-4:])
    if inner is not None:
        return is_public(inner)
    return address in _GLOBAL_UNICAST and address.is_global


def download(address: str, max_bytes: int, timeout: float, allow_private_addresses: bool = False) -> BinaryIO:
    """
    Download an http or https address into a temporary file, which the caller closes.

    Args:
        max_bytes: of the body.
        timeout: seconds for the whole download, including redirects.
        allow_private_addresses: also connect to IP addresses that are not public: this machine, the local network.

    Raises DownloadError if the address cannot be downloaded, DownloadLimitError if the body is too large,
    DownloadTimeoutError if the download takes too long.
    """
    deadline = _Deadline(timeout)
    file = tempfile.TemporaryFile()  # noqa: SIM115 (the caller closes it)
    origin = ""
    try:
        for _ in range(MAX_REDIRECTS + 1):
            with _reasons(origin, deadline):
                target = _Target.of(address)
                with _connected(target, deadline, allow_private_addresses) as connection:
                    response = _response(target, connection, deadline)
                    location = response.getheader("Location")
                    if response.status not in _REDIRECTS or location is None:
                        _copy_body(response, file, max_bytes)
                        return file
                address = _next_address(address, location)
            origin = f"redirected to {_printable(redacted(address))}: "
        raise DownloadError(f"it is redirected more than {MAX_REDIRECTS} times")
    except BaseException:
        file.close()
        raise


class _Deadline:
    def __init__(self, seconds: float):
        self.seconds = seconds
        self._end = time.monotonic() + seconds

    def is_over(self) -> bool:
        return time.monotonic() >= self._end - 1e-3  # a wait for the remaining time may end a little early

    def patience(self) -> float:
        """Return the seconds that one step may take. Raises TimeoutError if none are left."""
        if self.is_over():
            raise TimeoutError
        return min(PATIENCE, self._end - time.monotonic())


class _Target(NamedTuple):
    """The parts of an address: scheme, host, port and the path to ask for."""

    scheme: str
    host: str
    port: int
    path: str

    @classmethod
    def of(cls, address: str) -> _Target:
        try:
            parts = urlsplit(address)
            if parts.scheme not in ("http", "https"):
                raise DownloadError("only http:// and https:// addresses are supported; download the file first")
            if "@" in parts.netloc:
                raise DownloadError("user names and passwords in addresses are not sent; download the file first")
            default_port = 443 if parts.scheme == "https" else 80
            host, port = parts.hostname or "", default_port if parts.port is None else parts.port
            if "[" in parts.netloc:
                ipaddress.IPv6Address(host)
            elif not re.fullmatch(r"[\w.-]+", host):
                raise ValueError(host)
            host = host.encode("idna").decode()
            path = quote(parts.path or "/", safe=_SAFE) + (f"?{quote(parts.query, safe=_SAFE)}" if parts.query else "")
        except ValueError:
            raise DownloadError("the address is malformed") from None  # the other error may quote a password
        return cls(parts.scheme, host, port, path)


@contextlib.contextmanager
def _reasons(origin: str, deadline: _Deadline) -> Iterator[None]:
    """Turn every error of one exchange into a DownloadError."""
    try:
        yield
    except DownloadError as error:
        raise type(error)(f"{origin}{error}") from error.__cause__
    except UnicodeError:  # in the host name
        raise DownloadError(f"{origin}the address is malformed") from None
    except http.client.HTTPException as error:
        reason = f"the server does not speak proper HTTP ({type(error).__name__}: {_printable(str(error))})"
        raise DownloadError(origin + reason) from None
    except TimeoutError as error:
        if deadline.is_over():
            raise DownloadTimeoutError(f"it took longer than download_timeout={deadline.seconds} seconds") from None
        raise DownloadError(f"{origin}the server did not answer for {PATIENCE:g} seconds") from error
    except ssl.SSLEOFError:
        raise DownloadError(f"{origin}the server broke off the connection") from None
    except ssl.SSLCertVerificationError as error:
        raise DownloadError(f"{origin}the server's certificate is not valid: {error.verify_message}") from error
    except OSError as error:
        raise DownloadError(f"{origin}{type(error).__name__}: {error.strerror or error}") from error


def _look_up(target: _Target, deadline: _Deadline) -> list[Any]:
    """Run `socket.getaddrinfo` in a thread, because it cannot be interrupted. The thread ends with the answer."""
    answers: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def look_up() -> None:
        try:
            answers.put(socket.getaddrinfo(target.host, target.port, type=socket.SOCK_STREAM))
        except (OSError, UnicodeError) as error:
            answers.put(error)

    threading.Thread(target=look_up, name=f"looking up {target.host}", daemon=True).start()
    try:
        answer = answers.get(timeout=deadline.patience())
    except queue.Empty:
        raise TimeoutError from None
    if isinstance(answer, Exception):
        raise answer
    return answer


def _connected(target: _Target, deadline: _Deadline, allow_private_addresses: bool) -> socket.socket:
    """Connect to the first of the host's addresses that is allowed and answers."""
    failure: Exception | None = None
    for family, kind, protocol, _, place in _look_up(target, deadline):
        ip = ipaddress.ip_address(place[0])
        if not allow_private_addresses and not is_public(ip):
            failure = failure or PrivateAddressError(
                f"{ip} is not a public address; if you trust it, allow it (`VideoLimits.allow_private_addresses`, "
                "on the command line --allow-private-addresses)"
            )
            continue
        try:
            return _connected_to(socket.socket(family, kind, protocol), place, target, deadline)
        except OSError as error:
            failure = error
    raise failure or OSError(f"{target.host} has no address")


def _connected_to(connection: socket.socket, place: Any, target: _Target, deadline: _Deadline) -> socket.socket:
    try:
        connection.settimeout(deadline.patience())
        connection.connect(place)
        if target.scheme == "https":
            connection.settimeout(deadline.patience())
            # A connection that is cut off must not look like the end of a body without a length.
            return ssl.create_default_context().wrap_socket(
                connection, server_hostname=target.host, suppress_ragged_eofs=False
            )
        return connection
    except BaseException:
        connection.close()
        raise


class _TimedReader(io.RawIOBase):
    def __init__(self, connection: socket.socket, deadline: _Deadline):
        self._connection, self._deadline = connection, deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._connection.settimeout(self._deadline.patience())
        return self._connection.recv_into(buffer)


class _TimedSocket:
    """The part of a socket that `http.client` uses, within a deadline. The owner closes the socket."""

    def __init__(self, connection: socket.socket, deadline: _Deadline):
        self._connection, self._deadline = connection, deadline

    def sendall(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            self._connection.settimeout(self._deadline.patience())
            view = view[self._connection.send(view) :]

    def makefile(self, mode: str) -> io.BufferedReader:
        return io.BufferedReader(_TimedReader(self._connection, self._deadline))

    def close(self) -> None:
        pass


def _response(target: _Target, connection: socket.socket, deadline: _Deadline) -> http.client.HTTPResponse:
    exchange = http.client.HTTPConnection(target.host, target.port)
    exchange.default_port = 443 if target.scheme == "https" else 80  # which the Host header leaves out
    exchange.sock = _TimedSocket(connection, deadline)
    # http.client itself asks for "Accept-Encoding: identity".
    exchange.request("GET", target.path, headers={"User-Agent": "vivit_hf", "Connection": "close"})
    return exchange.getresponse()


def _next_address(address: str, location: str) -> str:
    # http.client reads headers as Latin-1; addresses are sent as UTF-8.
    location = location.encode("latin-1").decode("utf-8", "replace")
    try:
        return urljoin(address, location)
    except ValueError:
        raise DownloadError("it is redirected to a malformed address") from None


def _copy_body(response: http.client.HTTPResponse, file: BinaryIO, max_bytes: int) -> None:
    if response.status not in _WHOLE:
        raise DownloadError(f"the server answers {response.status} ({_printable(response.reason)})")
    encoding = (response.getheader("Content-Encoding") or "").strip().lower()
    if encoding in _COMPRESSIONS:
        raise DownloadError(f"the server sends it compressed ({encoding}), which it was not asked for")
    promised, received = response.length, 0
    too_large = f"it has more than max_bytes={max_bytes} bytes"
    if promised is not None and promised > max_bytes:
        raise DownloadLimitError(too_large)
    # `read` would wait for a whole chunk, however slowly it drips.
    while promised is None or received < promised:
        size = _CHUNK_BYTES if promised is None else min(_CHUNK_BYTES, promised - received)
        chunk = response.read1(size)
        if not chunk:
            break
        received += len(chunk)
        if received > max_bytes:
            raise DownloadLimitError(too_large)
        file.write(chunk)
    if promised is not None and received < promised:
        raise DownloadError(f"the download broke off after {received} of {promised} bytes")


def _printable(text: str) -> str:
    """Return a server's text for a message: on one line, shortened, without control characters."""
    return repr(text[:200])[1:-1]
