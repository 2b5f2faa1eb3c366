"""HTTP/1.1 by raw sockets: what is refused, and that requests keep their bounds; h11 is the oracle of what is bad."""

import asyncio
import json
import select
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from http.client import HTTPResponse
from typing import Any, Literal

import h11
import pytest

from tests.support.engines import wait_until
from tests.support.serving import in_thread
from unperturb.service.http.protocol import MAX_LINES_BYTES, Protocol

HOST = b"Host: a\r\n"
POST = b"POST /p?q=1 HTTP/1.1\r\n" + HOST
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n"
NEXT = b"GET /next HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
LAST = b"GET /last HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n"
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
KEPT_S, SLOW_S, LARGE, MEDIUM = 2, 0.2, 50_000_000, 60_000  # the last in bytes, fewer than make a transport wait
LOOPS = ("uvloop", "asyncio")


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """Answer with what the request was, or with zeros; /slow takes its time, /early answers before the body."""
    body, more = b"", scope["path"] != "/early"
    while more:
        message = await receive()
        body, more = body + message.get("body", b""), message.get("more_body", False)
    if scope["path"] == "/slow":
        await asyncio.sleep(SLOW_S)
    seen = {
        "method": scope["method"],
        "path": scope["path"],
        "query": scope["query_string"].decode(),
        "headers": [[name.decode("latin-1"), value.decode("latin-1")] for name, value in scope["headers"]],
        "body": body.decode("latin-1"),
    }
    large = {"/large": LARGE, "/medium": MEDIUM, "/broken": MEDIUM}.get(scope["path"])
    answer = json.dumps(seen).encode() if large is None else bytes(large)
    length = [(b"content-length", str(len(answer)).encode())]
    await send({"type": "http.response.start", "status": 200, "headers": length})
    await send({"type": "http.response.body", "body": answer, "more_body": scope["path"] == "/broken"})


class Patient(Protocol):
    header_timeout_s, write_timeout_s, max_connections = 60.0, 60.0, 1000


class Strict(Protocol):
    header_timeout_s, write_timeout_s, max_connections = 1.0, 0.5, 1000

    def connection_made(self, transport: Any) -> None:
        """Leave what a client does not read to the transport, not to the kernel."""
        transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        super().connection_made(transport)


class Full(Protocol):
    header_timeout_s, write_timeout_s, max_connections = 60.0, 60.0, 40
    prompt_s = 60.0


class Recorded(Full):
    pieces: list[bytes]

    def connection_made(self, transport: Any) -> None:
        class Recording:
            def __getattr__(self, name: str) -> Any:
                return getattr(transport, name)

            def write(self, data: bytes) -> None:
                Recorded.pieces.append(bytes(data))
                transport.write(data)

        super().connection_made(Recording())


class Crowded(Full):
    prompt_s = 0.5


@contextmanager
def listening(protocol: type[Protocol], loop: Literal["uvloop", "asyncio"], *, kept_s: int = KEPT_S) -> Iterator[int]:
    with in_thread(echo, http=protocol, loop=loop, lifespan="off", timeout_keep_alive=kept_s) as port:
        yield port


@pytest.fixture(scope="module")
def ports() -> Iterator[dict[str, int]]:
    with listening(Patient, "uvloop") as one, listening(Patient, "asyncio") as other:
        yield {"uvloop": one, "asyncio": other}


@pytest.fixture(params=LOOPS)
def port(request: pytest.FixtureRequest, ports: dict[str, int]) -> int:
    return ports[request.param]


@pytest.fixture(scope="module")
def strict() -> Iterator[int]:
    """The port of a server that cuts clients off early."""
    with listening(Strict, "uvloop") as one:
        yield one


def exchange(port: int, *pieces: bytes, pause_s: float = 0.02) -> bytes:
    """Send the pieces, each in a packet of its own, and return all that comes until the server closes."""
    with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            for piece in pieces:
                client.sendall(piece)
                time.sleep(pause_s if len(pieces) > 1 else 0.0)
        except ConnectionError:  # it has closed before all was sent
            pass
        return read(client)


def read(client: socket.socket, count: int | None = None) -> bytes:
    """So many bytes, or all that come until the server closes."""
    received = b""
    with suppress(ConnectionResetError):  # it did not read what it had refused
        while (count is None or len(received) < count) and (
            part := client.recv(65536 if count is None else count - len(received))
        ):
            received += part
    return received


def answers(received: bytes) -> list[tuple[int, dict[str, Any]]]:
    """Return the status of each answer, and what it says that the request was."""
    found: list[tuple[int, dict[str, Any]]] = []
    while received:
        head, _, received = received.partition(b"\r\n\r\n")
        status, *headers = head.decode().split("\r\n")
        named = dict(line.lower().split(": ", 1) for line in headers)
        length = int(named["content-length"])
        body, received = received[:length], received[length:]
        code = int(status.split()[1])
        found.append((code, json.loads(body) if code == 200 else {}))
    return found


def refused_by_h11(request: bytes) -> bool:
    connection = h11.Connection(h11.SERVER)
    connection.receive_data(request)
    try:
        while connection.next_event() not in (h11.NEED_DATA, h11.PAUSED):
            pass
    except h11.RemoteProtocolError:
        return True
    return False


INVALID = {
    "no host": b"GET / HTTP/1.1\r\n\r\n",
    "two hosts": b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
    "space before the colon": b"GET / HTTP/1.1\r\nHost: a\r\nX : b\r\n\r\n",
    "space before the colon of the length": POST + b"Content-Length : 3\r\n\r\nabc",
    "space before the first header": b"GET / HTTP/1.1\r\n Host: a\r\n\r\n",
    "no colon": b"GET / HTTP/1.1\r\nHost: a\r\nX\r\n\r\n",
    "name that is no token": b"GET / HTTP/1.1\r\nHost: a\r\nX(y): b\r\n\r\n",
    "empty name": b"GET / HTTP/1.1\r\nHost: a\r\n: b\r\n\r\n",
    "NUL in a value": b"GET / HTTP/1.1\r\nHost: a\r\nX: a\0b\r\n\r\n",
    "CR in a value": b"GET / HTTP/1.1\r\nHost: a\r\nX: a\rb\r\n\r\n",
    "NUL in the target": b"GET /\0 HTTP/1.1\r\nHost: a\r\n\r\n",
    "space in the target": b"GET /a b HTTP/1.1\r\nHost: a\r\n\r\n",
    "byte above ASCII in the target": b"GET /\xe4 HTTP/1.1\r\nHost: a\r\n\r\n",
    "byte above ASCII in the query": b"GET /?a=\xe4 HTTP/1.1\r\nHost: a\r\n\r\n",
    "no target": b"GET HTTP/1.1\r\nHost: a\r\n\r\n",
    "no version": b"GET /\r\nHost: a\r\n\r\n",
    "version that is none": b"GET / HTTP/1.x\r\nHost: a\r\n\r\n",
    "lower-case version": b"GET / http/1.1\r\nHost: a\r\n\r\n",
    "method that is no token": b"G(T / HTTP/1.1\r\nHost: a\r\n\r\n",
    "TLS": bytes.fromhex("16030100c8010000c40303"),
    "empty line first": b"\r\n" + NEXT,
    "space first": b" " + NEXT,
    "two lengths": POST + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
    "list of two lengths": POST + b"Content-Length: 3, 4\r\n\r\nabcd",
    "negative length": POST + b"Content-Length: -3\r\n\r\nabc",
    "length with a sign": POST + b"Content-Length: +3\r\n\r\nabc",
    "hexadecimal length": POST + b"Content-Length: 0x3\r\n\r\nabc",
    "length with an underscore": POST + b"Content-Length: 1_0\r\n\r\nabc",
    "no digit in the length": POST + b"Content-Length:\r\n\r\nabc",
    "length of 21 digits": POST + b"Content-Length: 100000000000000000000\r\n\r\nabc",
    "coding that is not chunked": POST + b"Transfer-Encoding: gzip\r\n\r\n0\r\n\r\n",
    "coding before chunked": POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
    "coding after chunked": POST + b"Transfer-Encoding: chunked, identity\r\n\r\n0\r\n\r\n",
    "chunked twice": POST + b"Transfer-Encoding: chunked\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunked twice in a list": POST + b"Transfer-Encoding: chunked, chunked\r\n\r\n0\r\n\r\n",
    "chunked with a parameter": POST + b"Transfer-Encoding: chunked;a=b\r\n\r\n0\r\n\r\n",
    "chunked with a vertical tab": POST + b"Transfer-Encoding: \x0bchunked\r\n\r\n0\r\n\r\n",
    "size that is no number": CHUNKED + b"x\r\nabc\r\n0\r\n\r\n",
    "negative size": CHUNKED + b"-3\r\nabc\r\n0\r\n\r\n",
    "size with 0x": CHUNKED + b"0x3\r\nabc\r\n0\r\n\r\n",
    "space before the size": CHUNKED + b" 3\r\nabc\r\n0\r\n\r\n",
    "size of 21 digits": CHUNKED + b"100000000000000000003\r\nabc\r\n0\r\n\r\n",
    "size line that ends in LF": CHUNKED + b"3\nabc\r\n0\r\n\r\n",
    "no size": CHUNKED + b"\r\nabc\r\n0\r\n\r\n",
    "chunk longer than its size": CHUNKED + b"3\r\nabcd\r\n0\r\n\r\n",
    "chunk without its CRLF": CHUNKED + b"3\r\nabc0\r\n\r\n",
    "trailer that is none": CHUNKED + b"0\r\nX Y\r\n\r\n",
    "head without an end": POST + b"X: " + b"a" * MAX_LINES_BYTES,
    "many headers without an end": POST + b"a:\r\n" * (MAX_LINES_BYTES // 4),
    "extension without an end": CHUNKED + b"3;" + b"a" * 2 * MAX_LINES_BYTES,
    "trailers without an end": CHUNKED + b"0\r\n" + b"a: b\r\n" * (2 * MAX_LINES_BYTES // 6 + 1),
}
STRICTER = {
    "length and chunked": POST + b"Content-Length: 3\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "chunked and length": POST + b"Transfer-Encoding: chunked\r\nContent-Length: 3\r\n\r\n0\r\n\r\n",
    "a length twice": POST + b"Content-Length: 3\r\nContent-Length: 3\r\n\r\nabc",
    "a length twice in a list": POST + b"Content-Length: 3, 3\r\n\r\nabc",
    "chunked in HTTP/1.0": b"POST / HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "folded line": b"GET / HTTP/1.1\r\nHost: a\r\nX: a\r\n b\r\n\r\n",
    "folded line under Upgrade": b"GET / HTTP/1.1\r\nHost: a\r\nUpgrade: a\r\n b\r\n\r\n",
    "control character in a value": b"GET / HTTP/1.1\r\nHost: a\r\nX: a\x01b\r\n\r\n",
    "lines that end in LF": b"GET / HTTP/1.1\nHost: a\n\n",
    "one line that ends in LF": b"GET / HTTP/1.1\r\nX: a\nHost: a\r\n\r\n",
    "Upgrade after LF": POST + b"Connection: upgrade\nUpgrade: x\r\nContent-Length: 3\r\n\r\nabc",
    "length in a trailer": CHUNKED + b"0\r\nContent-Length: 3\r\n\r\nabc",
    "space after the size": CHUNKED + b"3 \r\nabc\r\n0\r\n\r\n",
    "CONNECT": b"CONNECT a:1 HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabc",
    "CONNECT of a path": b"CONNECT / HTTP/1.1\r\nHost: a\r\n\r\n",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "HTTP/2 by another method": b"GET / HTTP/2.0\r\nHost: a\r\n\r\n",
    "HTTP/0.9": b"GET / HTTP/0.9\r\nHost: a\r\n\r\n",
    "method that is not known": b"FETCH / HTTP/1.1\r\nHost: a\r\n\r\n",
    "large head in one piece": POST + b"X: " + b"a" * MAX_LINES_BYTES + b"\r\n\r\n",
}


@pytest.mark.parametrize("request_", INVALID.values(), ids=INVALID)
def test_what_h11_refuses_is_refused_and_nothing_after_it_is_answered(port: int, request_: bytes) -> None:
    assert refused_by_h11(request_)
    assert answers(exchange(port, request_ + LAST)) == [(400, {})]


@pytest.mark.parametrize("request_", STRICTER.values(), ids=STRICTER)
def test_what_h11_lets_pass_and_two_readers_may_read_in_two_ways_is_refused(port: int, request_: bytes) -> None:
    assert not refused_by_h11(request_)
    assert answers(exchange(port, request_ + LAST)) == [(400, {})]


VALID = {
    "no body": (b"GET /p?q=1 HTTP/1.1\r\nHost: a\r\n\r\n", ""),
    "length": (POST + b"Content-Length: 3\r\n\r\nabc", "abc"),
    "empty body": (POST + b"Content-Length: 0\r\n\r\n", ""),
    "body of a GET": (b"GET /p?q=1 HTTP/1.1\r\nHost: a\r\nContent-Length: 3\r\n\r\nabc", "abc"),
    "chunks": (CHUNKED + b"3\r\nabc\r\nA\r\n0123456789\r\n0\r\n\r\n", "abc0123456789"),
    "no chunk": (CHUNKED + b"0\r\n\r\n", ""),
    "coding in upper case": (POST + b"Transfer-Encoding: CHUNKED\r\n\r\n1\r\na\r\n0\r\n\r\n", "a"),
    "extensions": (CHUNKED + b'3;a;b="c"\r\nabc\r\n00\r\n\r\n', "abc"),
    "blank lines in chunks": (CHUNKED + b"8\r\n\r\n\r\n\r\n\r\n\r\n0\r\n\r\n", "\r\n\r\n\r\n\r\n"),
    "request in a body": (POST + b"Content-Length: %d\r\n\r\n" % len(NEXT) + NEXT, NEXT.decode()),
    "request in a chunk": (CHUNKED + b"%x\r\n%b\r\n0\r\n\r\n" % (len(NEXT), NEXT), NEXT.decode()),
    "absolute target": (b"GET http://a/p?q=1 HTTP/1.1\r\nHost: a\r\n\r\n", ""),
    "bytes above ASCII in a value": (b"GET /p?q=1 HTTP/1.1\r\nHost: a\r\nX: \xe4\r\n\r\n", ""),
    "upgrade to HTTP/2": (
        POST + b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: a\r\n"
        b"Content-Length: %d\r\n\r\n" % len(NEXT) + NEXT,
        NEXT.decode(),
    ),
    "upgrade to a WebSocket": (
        POST + b"upgrade: websocket\r\nconnection: upgrade\r\nSec-WebSocket-Key: YQ==\r\nSec-WebSocket-Version: 13\r\n"
        b"Transfer-Encoding: chunked\r\n\r\n1\r\na\r\n0\r\n\r\n",
        "a",
    ),
    "large head": (POST + b"X: " + b"a" * (MAX_LINES_BYTES - 200) + b"\r\n\r\n", ""),
}


STEPS = {"in one packet": None, "byte by byte": 1, "in pieces of 7": 7}
ON_BOTH = ("length", "chunks", "request in a chunk", "upgrade to a WebSocket")
CUT = {
    f"{loop}-{step}-{name}": (loop, STEPS[step], *VALID[name])
    for loop in LOOPS
    for step in STEPS
    for name in (VALID if loop == "uvloop" else ON_BOTH)
    if STEPS[step] is None or len(VALID[name][0]) < 2000  # a large one would be thousands of packets
}


@pytest.mark.parametrize(("port", "step", "request_", "body"), CUT.values(), ids=CUT, indirect=["port"])
def test_request_ends_where_it_says_however_it_is_cut_and_the_next_is_another(
    port: int, step: int | None, request_: bytes, body: str
) -> None:
    every = request_ + request_ + LAST
    pieces = [every] if step is None else [every[i : i + step] for i in range(0, len(every), step)]
    (one, first), (two, second), (three, last) = answers(exchange(port, *pieces, pause_s=0.0005))
    assert (one, two, three) == (200, 200, 200)
    assert first == second
    assert (first["path"], first["query"], first["body"]) == ("/p", "q=1", body)
    assert last["path"] == "/last"
    assert "upgrade" not in [name for name, _ in first["headers"]]


def test_trailers_are_no_headers(port: int) -> None:
    trailers = b"X-API-Key: stolen\r\nExpect: 100-continue\r\n"
    (_, seen), (_, last) = answers(exchange(port, CHUNKED + b"1\r\na\r\n0\r\n" + trailers + b"\r\n" + LAST))
    assert [name for name, _ in seen["headers"]] == ["host", "transfer-encoding"]
    assert last["path"] == "/last"


def test_requests_that_come_at_once_are_answered_in_their_order_and_a_bad_one_after_the_good(port: int) -> None:
    slow = b"GET /slow HTTP/1.1\r\nHost: a\r\n\r\n"
    found = answers(exchange(port, slow + CHUNKED + b"1\r\na\r\n0\r\n\r\n" + slow + b"BAD\r\n\r\n" + LAST))
    assert [(status, seen.get("path")) for status, seen in found] == [
        (200, "/slow"),
        (200, "/p"),
        (200, "/slow"),
        (400, None),
    ]


def test_bad_chunk_ends_a_request_that_is_in_progress(port: int) -> None:
    assert answers(exchange(port, CHUNKED + b"1\r\na\r\n", b"x\r\n" + LAST)) == [(400, {})]


def test_rest_of_a_body_whose_request_has_been_answered_is_read_as_that(port: int) -> None:
    early = b"POST /early HTTP/1.1\r\nHost: a\r\nContent-Length: %d\r\n\r\n" % (len(NEXT) + 10)
    found = answers(exchange(port, early, b"0123456789", NEXT, LAST, pause_s=0.1))
    assert [seen["path"] for _, seen in found] == ["/early", "/last"]


def test_expectation_is_met_in_http_1_1_alone(port: int) -> None:
    expecting = (
        b"POST /p HTTP/1.%d\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: 3\r\nConnection: close\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", port), timeout=10) as client:
        client.sendall(expecting % 1)
        assert read(client, len(CONTINUE)) == CONTINUE
        client.sendall(b"abc")
        assert read(client).startswith(b"HTTP/1.1 200 OK\r\n")
    assert exchange(port, expecting % 0, b"abc").startswith(b"HTTP/1.1 200 OK\r\n")


def test_connection_of_http_1_0_and_one_that_is_asked_to_close_close(port: int) -> None:
    old = b"GET /old HTTP/1.0\r\n\r\n"
    for request in (old, LAST):
        (answer,) = answers(exchange(port, request + NEXT))
        assert answer[0] == 200
    assert b"\r\nconnection: close\r\n" in exchange(port, old)


def test_slow_heads_are_cut_off_the_first_and_a_later_one(strict: int) -> None:
    begun = b"GET /p HTTP/1.1\r\nHost: a\r\n"
    for before in (b"", begun + b"\r\n"):
        started = time.monotonic()
        received = exchange(strict, before + begun, *(b"X: y\r\n" for _ in range(4)), pause_s=0.4)
        assert len(answers(received)) == bool(before)
        assert 0.9 < time.monotonic() - started < 4


def test_client_that_does_not_read_its_answer_is_cut_off(strict: int) -> None:
    with socket.create_connection(("127.0.0.1", strict), timeout=10) as client:
        client.sendall(b"GET /large HTTP/1.1\r\nHost: a\r\n\r\n")
        time.sleep(2.0)
        received = 0
        with suppress(ConnectionResetError):
            while part := client.recv(1 << 20):  # what had been sent before; a timeout where it is still open
                received += len(part)
    assert 0 < received < LARGE


UNREAD = {
    "kept alive": b"GET /medium HTTP/1.1\r\nHost: a\r\n\r\n",
    "closed by the answer": LAST.replace(b"/last", b"/medium"),
    "followed by no request": b"GET /medium HTTP/1.1\r\nHost: a\r\n\r\nBAD\r\n\r\n",
    "broken off": b"GET /broken HTTP/1.1\r\nHost: a\r\n\r\n",
}


@pytest.mark.parametrize("request_", UNREAD.values(), ids=UNREAD)
def test_client_that_leaves_the_last_of_its_answer_unread_is_cut_off(strict: int, request_: bytes) -> None:
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.settimeout(10)
        client.connect(("127.0.0.1", strict))
        client.sendall(request_)
        time.sleep(KEPT_S + Strict.write_timeout_s + 1.0)
        assert 0 < len(read(client)) < MEDIUM


def test_no_more_connections_are_held_than_may_be() -> None:
    """One that is one too many is closed, or takes the place of the one that has been unused for longest."""
    kept = LAST.replace(b"Connection: close\r\n", b"")

    def served(client: socket.socket, request: bytes) -> bool:
        client.sendall(request)
        with HTTPResponse(client) as answer:
            answer.begin()
            return answer.read() != b"" and answer.status == 200

    with listening(Full, "uvloop", kept_s=60) as port, ExitStack() as held:
        opened = (socket.create_connection(("127.0.0.1", port), timeout=10) for _ in range(Full.max_connections))
        clients = [held.enter_context(client) for client in opened]
        for client in clients:
            assert served(client, kept)
            client.sendall(kept[:9])  # it is in use: a next head has begun
        wait_until(lambda: exchange(port, LAST) == b"")
        assert served(clients[7], kept[9:])
        time.sleep(0.02)  # uvloop's clock counts milliseconds: served in the same one, either is unused for longest
        assert served(clients[3], kept[9:])
        assert exchange(port, LAST).startswith(b"HTTP/1.1 200 OK")
        assert clients[7].recv(1) == b""
        assert select.select(clients, [], [], 0.0)[0] == [clients[7]]
        held.close()
        wait_until(lambda: exchange(port, LAST).startswith(b"HTTP/1.1 200 OK"))


@pytest.mark.parametrize("loop", LOOPS)
def test_an_answer_is_sent_in_one_piece_unless_it_is_large(loop: Literal["uvloop", "asyncio"]) -> None:
    with listening(Recorded, loop) as port:
        Recorded.pieces = []
        received = exchange(port, LAST)
        assert Recorded.pieces == [received]
        Recorded.pieces = []
        received = exchange(port, LAST.replace(b"/last", b"/large"))
        assert len(received) > LARGE
        assert len(Recorded.pieces) == 2
        assert b"".join(Recorded.pieces) == received


def test_slow_heads_keep_nobody_out() -> None:
    """They give way to new connections, one to each; a request in progress does not."""
    with listening(Crowded, "uvloop", kept_s=60) as port, ExitStack() as held:
        opened = (socket.create_connection(("127.0.0.1", port), timeout=10) for _ in range(Crowded.max_connections))
        busy, *slow = [held.enter_context(client) for client in opened]
        busy.sendall(POST + b"Content-Length: 1\r\nConnection: close\r\n\r\n")
        for client in slow:
            client.sendall(LAST[:9])
        time.sleep(Crowded.prompt_s + 0.1)
        for _ in range(5):
            assert exchange(port, LAST).startswith(b"HTTP/1.1 200 OK")
        assert 1 <= len(select.select(slow, [], [], 0.0)[0]) <= 5
        busy.sendall(b"x")
        assert read(busy).startswith(b"HTTP/1.1 200 OK")
