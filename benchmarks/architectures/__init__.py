"""The self-test's verdict for every architecture of vLLM that a tiny model can be made for."""
