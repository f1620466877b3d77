"""The seam to vLLM: what reads its configuration, its requests, its batches and its model."""
