"""A request's body in its original chunks, and whether it can mention a steer at all.

Nothing here costs more than looking at each chunk once. The chunks are passed on as they came, each
let go as it is taken: the body is never held twice.
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
"""An escape for what needs none; all names that matter here are ASCII."""


class Hints:
    """Bytes without which a body asks nothing of us: spelled out, escaped, in UTF-16 or UTF-32."""

    def __init__(self, presets: Iterable[str] = ()) -> None:
        self._words = (*_WORDS, *(f":{preset}".encode() for preset in presets))
        self.overlap = max(len(_ESCAPE), *(len(word) - 1 for word in self._words))

    def are_in(self, text: bytes) -> bool:
        """Whether a piece of a body holds any of them."""
        if any(word in text for word in self._words):
            return True
        return _ESCAPE in text and _ASCII_ESCAPE.search(text) is not None


class ReceivedBody:
    """The chunks of a body; ``may_ask`` once any hint has come."""

    def __init__(self, hints: Hints) -> None:
        self.may_ask = False
        self.length = 0
        self._hints = hints
        self._chunks: deque[bytes] = deque()
        self._seam = b""
        self._end: Message | None = None

    async def receive(self, receive: Receive) -> bool:
        """Receive all chunks; False if the client went away before the last one."""
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
        """A copy of the body in one piece."""
        return b"".join(self._chunks)

    def append(self, members: bytes, to: bytes | None = None) -> None:
        """Add members at the end of the JSON object that the body is, or of another body.

        The last member of a name counts. What was received is not copied: the last brace goes, and
        comes again behind the new members.
        """
        if to is not None:
            self._chunks = deque([to])
        while not (last := self._chunks.pop().rstrip(b" \t\r\n")):
            continue
        self._chunks += [last[:-1], members + b"}"]
        self.length = sum(map(len, self._chunks))

    def replay(self, receive: Receive) -> Receive:
        """A ``receive`` that gives the chunks once and then what comes, such as a disconnect."""

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
        if self.may_ask:
            return
        overlap = self._hints.overlap
        seam = self._seam + chunk[:overlap]
        self.may_ask = self._hints.are_in(chunk) or self._hints.are_in(seam)
        self._seam = (self._seam + chunk[-overlap:])[-overlap:]
