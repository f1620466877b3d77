"""What ``vllm-steer demo`` runs: a server of the embedded model and a batch of requests to it."""
