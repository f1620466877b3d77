"""Polls a server's ``/health`` until its input ends, and prints when each poll began and ended.

The first line reports the start. It is a separate process, so that the client that sends hostile
bodies does not slow it down.
"""

import http.client
import json
import select
import sys
import time
from urllib.parse import urlsplit

PAUSE_S = 0.01


def poll(url: str) -> list[tuple[float, float]]:
    """Begin and end of each poll, by the monotonic clock; raises on any answer but 200."""
    address = urlsplit(url)
    assert address.hostname is not None
    polls = []
    connection = http.client.HTTPConnection(address.hostname, address.port, timeout=60)
    print("begun", flush=True)
    while not select.select([sys.stdin], [], [], PAUSE_S)[0]:
        begin = time.monotonic()
        connection.request("GET", "/health")
        reply = connection.getresponse()
        reply.read()
        polls.append((begin, time.monotonic()))
        assert reply.status == 200
    return polls


if __name__ == "__main__":
    print(json.dumps(poll(sys.argv[1])))
