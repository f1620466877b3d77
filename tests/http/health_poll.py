"""Polls a server's ``/health`` until its input ends, and prints the latencies in milliseconds.

A process of its own, so that the client that sends hostile bodies does not slow it down.
"""

import http.client
import json
import select
import sys
import time
from urllib.parse import urlsplit

PAUSE_S = 0.03


def poll(url: str) -> list[float]:
    """Latencies, one per poll; raises on any answer but 200."""
    address = urlsplit(url)
    assert address.hostname is not None
    latencies = []
    connection = http.client.HTTPConnection(address.hostname, address.port, timeout=60)
    while not select.select([sys.stdin], [], [], PAUSE_S)[0]:
        begin = time.perf_counter()
        connection.request("GET", "/health")
        reply = connection.getresponse()
        reply.read()
        latencies.append(1000 * (time.perf_counter() - begin))
        assert reply.status == 200
    return latencies


if __name__ == "__main__":
    print(json.dumps(poll(sys.argv[1])))
