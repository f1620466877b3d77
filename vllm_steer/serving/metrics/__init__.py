"""Prometheus metrics of steered requests and of steers that are loaded while the server runs.

They are on the registry that vLLM's ``/metrics`` serves. With several API servers vLLM sets
``PROMETHEUS_MULTIPROC_DIR`` before it starts them; ``prometheus_client`` then keeps every value in
a file per process, and ``/metrics`` of any server adds up the counters of all.
"""
