"""Strengths of dynamic requests on their way back: from engine outputs to users and counters."""
