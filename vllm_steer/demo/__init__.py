"""The demo of ``vllm-steer demo``: a server with the embedded model and a batch of requests."""
