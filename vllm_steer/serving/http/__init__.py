"""The HTTP side: ``steer`` and ``steer_strengths`` in the body, and ``BASE:preset`` as the model.

vLLM adds the middleware by its name through its own ``--middleware``. It moves what the request
body asks for into ``vllm_xargs``, which vLLM carries to ``SamplingParams``; checks and messages are
those of admission. Only requests for generated text are read, behind the check of API keys, and a
body that mentions none of it is passed on in the chunks that it came in.

    middleware   where it stands in vLLM's application, and the way of one request
    routes       which requests are read
    received     the chunks of a body, and whether they can mention a steer
    members      the few members of the body that matter, without the rest
    near_misses  names that were meant for ours
    rewriting    what is appended to the body
    refusal      the 400
"""

from vllm_steer.serving.http.middleware import Steering, SteerMiddleware

__all__ = ["SteerMiddleware", "Steering"]
