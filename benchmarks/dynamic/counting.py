"""What the figures would be if nothing but the method's own work took time, by counting.

Per token a request with one dynamic delta takes two steps (its base and its probe read the token,
then it reads the token itself) of three rows in all. If a step costs the same whatever its rows,
steps are what counts; if it costs by its rows, rows are. Either way it cannot be cheaper than the
lower of the two, nor need it be dearer than the higher.
"""

STREAMS = 2  # base and one probe, beside the request itself


def of_request(kind: str, head_share: float) -> tuple[float, float]:
    """The time of a token over that of an unsteered one: by steps, by rows."""
    if kind in ("delta dynamic", "two steps, three rows"):
        return 2.0, 1.0 + STREAMS
    if kind == "lm dynamic":  # base and probe are rows of the head alone, of the same step
        return 1.0, 1.0 + STREAMS * head_share
    return 1.0, 1.0


def of_loop(requests: int, prompt_tokens: int, tokens: int) -> tuple[float, float]:
    """The loop's time of a token over ours: by passes, by rows.

    The loop makes three passes over the whole text, we two steps for all requests together.
    """
    mean_length = prompt_tokens + (tokens - 1) / 2
    return 3 * requests / 2, mean_length


def of_ordinary(ordinary: int, dynamic: int) -> tuple[float, float]:
    """Tokens per second of ``ordinary`` requests beside ``dynamic`` ones over those beside
    ``3 * dynamic`` ordinary ones: by steps, by rows.
    """
    streams = 1 + STREAMS
    return 1.0, (ordinary + streams * dynamic) / (ordinary + streams * dynamic / 2)
