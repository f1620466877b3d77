"""HTTP requests: ``steer`` and ``steer_strengths`` in the body, ``BASE:preset`` as the model.

vLLM adds the middleware by its name (``--middleware``). It moves the steering arguments of a body
to ``vllm_xargs``, which vLLM copies to ``SamplingParams``; checks and messages are those of
admission. It reads only requests for generated text, after vLLM's check of API keys, and passes a
body without steering arguments on in its original chunks.

    middleware         its position in vLLM's application, and the handling of a request
    routes             which requests are read
    request_body       the chunks of a body, and whether they may mention a steer
    json_members       extracts some members of a JSON body
    misspelled_fields  rejects misspelled field names
    body_rewrite       the members that are appended to the body
    forms              multipart forms, checked as they pass
    realtime           events of a websocket
    bad_request        HTTP 400 responses
    steer_list         the steers and presets, ``GET /v1/steers``
    playground         the page, ``GET /steer``
"""

from vllm_steer.serving.http.middleware import Steering, SteerMiddleware

__all__ = ["SteerMiddleware", "Steering"]
