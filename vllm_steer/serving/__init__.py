"""Integration with vLLM: its configuration, requests, batches and models."""
