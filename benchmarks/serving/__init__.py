"""What steers cost as the users of a server see it: servers, vLLM's clients, offline runs."""
