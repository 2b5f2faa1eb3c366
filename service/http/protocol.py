"""HTTP/1.1 on one connection: uvicorn's protocol on httptools, with the limits and rules that neither has.

httptools (llhttp) parses, by RFC 9112 without leniencies. Added here:

- a head, the lines between a body's chunks, and a trailer section have at most MAX_LINES_BYTES;
- a head is refused at its first byte where that is no request's;
- HTTP/1.1 names exactly one host (RFC 9112, 3.2); the version is 1.0 or 1.1; there is no CONNECT;
- the only transfer coding is `chunked`, once, in HTTP/1.1 alone (6.1);
- `Upgrade` is ignored (RFC 9110, 7.8): llhttp would take a body after it for another protocol, and uvicorn for the next
  request;
- what stands in a trailer section never becomes a header of the request;
- one request is read at a time: what a client sends before it is answered waits, not parsed, and no error of a later
  request is written into an earlier one's answer.
"""

import re

import httptools

from unperturb.service.http.connection import TimedConnection

MAX_LINES_BYTES = 16 * 1024
BLANK_LINE = re.compile(rb"\n\r?\n")  # llhttp refuses a head with bare LFs; here they end the waiting for more of it
LAST_LINE = b"\r\n\r\n"  # of a chunked body, with what comes before it
OVERLAP = len(LAST_LINE) - 1  # it may come in pieces
UPGRADE = re.compile(rb"\r\nupgrade:[^\r\n]*(?=\r\n)", re.IGNORECASE)
TARGET = re.compile(rb"[!-~]+")


class _RefusedError(Exception):
    """A head against the rules above, raised inside of the parser, which hands it on as an HttpParserError."""


class Protocol(TimedConnection):
    """HTTP/1.1 with the limits and rules above, and a connection's limits of time; a subclass gives the figures."""

    _in_message = False  # its head has been parsed, its end has not
    _chunked = False
    _body_left = 0  # bytes, where it is not chunked
    _lines_bytes = 0  # of chunks' and trailers' lines since the last byte of a body
    _pending = b""  # a head that has not arrived whole, or what comes after a request that is not answered
    _tail = b""  # the last bytes of a chunked body that were parsed

    # -- bytes, in pieces that end where a message may -----------------------------------------------------------------

    def data_received(self, data: bytes) -> None:
        """Parse what has come, a message at a time."""
        self._unset_keepalive_if_required()
        if not self._in_message:
            data, self._pending = self._pending + data, b""
        at = 0
        while at < len(data) and not self.transport.is_closing():
            if self._in_message:
                at = self._read_body(data, at)
            elif self._in_request():
                self._pending = data[at:]
                self.flow.pause_reading()
                break
            else:
                at = self._read_head(data, at)
        self._time_head()

    def _read_head(self, data: bytes, at: int) -> int:
        """Parse the head that begins there once it is whole; return the place behind it."""
        if data[at] <= ord(" "):  # TLS, for one: it would wait for a blank line for ever
            self._refuse()
            return len(data)
        end = BLANK_LINE.search(data, at, at + MAX_LINES_BYTES)
        if end is None:
            if len(data) - at >= MAX_LINES_BYTES:
                self._refuse()
            self._pending = data[at:]
            return len(data)
        self._parse(UPGRADE.sub(b"", data[at : end.end()]))
        return end.end()

    def _read_body(self, data: bytes, at: int) -> int:
        """Parse a piece of the body that goes on there; return the place behind it."""
        if self._chunked:
            end = self._end_of_piece(data, at)
            self._lines_bytes += end - at
            if end == len(data):
                self._tail = (self._tail + data[-OVERLAP:])[-OVERLAP:]
        else:
            end = min(len(data), at + self._body_left)
            self._body_left -= end - at
        self._parse(data[at:end])
        if self._lines_bytes > MAX_LINES_BYTES or end == at:
            self._refuse()
        return end

    def _end_of_piece(self, data: bytes, at: int) -> int:
        """Return where the next blank line of a chunked body ends, which may be the message's end; or a shorter way."""
        if at == 0 and (place := (self._tail + data[:OVERLAP]).find(LAST_LINE)) >= 0:
            return place + len(LAST_LINE) - len(self._tail)
        place = data.find(LAST_LINE, max(0, at - OVERLAP), at + MAX_LINES_BYTES)
        return place + len(LAST_LINE) if place >= 0 else min(len(data), at + MAX_LINES_BYTES)

    def _parse(self, piece: bytes) -> None:
        try:
            self.parser.feed_data(piece)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self._refuse()

    def _refuse(self) -> None:
        """Answer 400 and close the connection; only close it where an answer has begun."""
        self.logger.warning("Invalid HTTP request received.")
        if self._in_request() and self.cycle.response_started:
            self.transport.close()
        elif not self.transport.is_closing():
            self.send_400_response("Invalid HTTP request received.")

    # -- what uvicorn and the parser call ------------------------------------------------------------------------------

    def on_response_complete(self) -> None:
        """Go on with a next request that has come already."""
        super().on_response_complete()
        if self._pending and not self.transport.is_closing():
            self.data_received(b"")

    def on_message_begin(self) -> None:
        """Begin a request; there is none in progress, or bytes were cut at the wrong place."""
        if self._in_request():
            raise _RefusedError
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a header, and leave out what stands in a trailer section."""
        if not self._in_message:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Refuse a head against the rules, before its request is begun."""
        version, method = self.parser.get_http_version(), self.parser.get_method()
        found: dict[bytes, list[bytes]] = {b"host": [], b"transfer-encoding": [], b"content-length": []}
        for name, value in self.headers:
            if name in found:
                found[name].append(value.lower())
        hosts, codings, lengths = found.values()
        if (
            version not in ("1.0", "1.1")
            or method == b"CONNECT"
            or len(hosts) > 1
            or (version == "1.1" and not hosts)
            or len(codings) + len(lengths) > 1
            or (codings and (codings != [b"chunked"] or version == "1.0"))
            or not TARGET.fullmatch(self.url)
        ):
            raise _RefusedError
        if version == "1.0":
            self.expect_100_continue = False  # RFC 9110, 10.1.1
        self._in_message, self._chunked = True, bool(codings)
        self._body_left = int(lengths[0]) if lengths else 0
        self._lines_bytes, self._tail = 0, b""
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        """Take a piece of the body."""
        self._lines_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """End the request's message."""
        self._in_message = False
        super().on_message_complete()
