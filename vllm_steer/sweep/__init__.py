"""Finding a steer's layers and strength: the strongest effect within a budget of perplexity."""
