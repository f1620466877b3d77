"""Dynamic strength in the engine: the streams of a request, their turns, their strengths."""
