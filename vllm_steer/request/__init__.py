"""A request's ``steer`` value: its grammar, and what it comes to under an engine's plan.

    "detox:5,humor"                  names with strengths; a name alone takes its default strength
    "friendly"  or  "friendly:0.5"   a preset: its mix, or its mix times a factor
    {"detox": 5, "humor": {"strength": 8, "layers": "20-31", "phase": "generation"}}
                                     a dict, or JSON in a string, with options for a steer:
                                     ``strength``, ``layers``, ``phase`` and ``schedule``
    "french:dynamic:1.5:0.6"         a strength that follows from the text: its maximum and its
                                     top_p may be left away
    {"french": {"strength": "dynamic", "max": 1.5, "top_p": 0.6, "kl": "plain", "layers": "8-15"}}
                                     the same with all of its options
    "none", "" or {}                 no steer, whatever the config's default says

A number is ASCII digits with a sign, a fraction and an exponent at most; ``ceilings`` says how
large a value may be. Strengths of one steer that is
named more than once with like options add up; a dynamic one is named once.
"""

from vllm_steer.request.dose_cache import DoseCache
from vllm_steer.request.options import SteerAttributes, read_dose
from vllm_steer.request.resolution import check_request, resolve

__all__ = ["DoseCache", "SteerAttributes", "check_request", "read_dose", "resolve"]
