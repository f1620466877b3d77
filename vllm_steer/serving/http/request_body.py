"""Receives a request body in chunks and scans it for signs of a steer.

Each chunk is scanned once. The chunks are passed on unchanged and released one by one, so the body
is never in memory twice.
"""

import re
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any, Final

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]

_WORDS: Final = (b"steer", b"Steer", b"STEER", b"\0")
_ESCAPE: Final = b"\\u00"
_ASCII_ESCAPE: Final = re.compile(rb"\\u00[2-7]")
"""An escape of a printable ASCII character; all names that matter here are ASCII."""


class SteerHints:
    """Byte sequences, one of which is in every body with a steer, in any encoding or escape."""

    def __init__(self, presets: Iterable[str] = ()) -> None:
        self._words = (*_WORDS, *(f":{preset}".encode() for preset in presets))
        self.overlap = max(len(_ESCAPE), *(len(word) - 1 for word in self._words))

    def are_in(self, text: bytes) -> bool:
        """True if a part of a body has any of them."""
        if any(word in text for word in self._words):
            return True
        return _ESCAPE in text and _ASCII_ESCAPE.search(text) is not None


class ReceivedBody:
    """The chunks of a body; ``may_mention_steer`` is true once a chunk had a hint."""

    def __init__(self, hints: SteerHints) -> None:
        self.may_mention_steer = False
        self.length = 0
        self._hints = hints
        self._chunks: deque[bytes] = deque()
        self._seam = b""
        self._end: Message | None = None

    async def receive(self, receive: Receive) -> bool:
        """Receive all chunks; False if the client disconnected before the last one."""
        more = True
        while more:
            message = await receive()
            if message["type"] != "http.request":
                self._end = message
                return False
            self._add(message.get("body", b""))
            more = message.get("more_body", False)
        return True

    def whole(self) -> bytes:
        """The whole body, as a copy."""
        return b"".join(self._chunks)

    def replace(self, body: bytes) -> None:
        """Pass on another body."""
        self._chunks = deque([body])
        self.length = len(body)

    def append(self, members: bytes, to: bytes | None = None) -> None:
        """Add members at the end of the JSON object that the body is, or of another body.

        The last member of a name counts. The received chunks are not copied: the closing brace is
        removed and added again after the new members.
        """
        if to is not None:
            self._chunks = deque([to])
        while not (last := self._chunks.pop().rstrip(b" \t\r\n")):
            continue
        self._chunks += [last[:-1], members + b"}"]
        self.length = sum(map(len, self._chunks))

    def replay(self, receive: Receive) -> Receive:
        """A ``receive`` that returns the chunks, then further messages such as a disconnect."""

        async def replay() -> Message:
            if self._chunks:
                chunk = self._chunks.popleft()
                more = bool(self._chunks) or self._end is not None
                return {"type": "http.request", "body": chunk, "more_body": more}
            if self._end is not None:
                message, self._end = self._end, None
                return message
            return await receive()

        return replay

    def _add(self, chunk: bytes) -> None:
        self._chunks.append(chunk)
        self.length += len(chunk)
        if self.may_mention_steer:
            return
        overlap = self._hints.overlap
        seam = self._seam + chunk[:overlap]
        self.may_mention_steer = self._hints.are_in(chunk) or self._hints.are_in(seam)
        self._seam = (self._seam + chunk[-overlap:])[-overlap:]
