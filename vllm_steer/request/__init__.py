"""Parses the ``steer`` value of a request and resolves it to doses under an engine's plan.

    "detox:5,humor"                  names with strengths; a name alone takes its default strength
    "friendly"  or  "friendly:0.5"   a preset: its mix, or its mix times a factor
    {"detox": 5, "humor": {"strength": 8, "layers": "20-31", "phase": "generation"}}
                                     a dict, or JSON in a string, with options for a steer:
                                     ``strength``, ``layers``, ``phase`` and ``schedule``
    "french:dynamic:1.5:0.6"         a dynamic strength: maximum and top_p are optional
    {"french": {"strength": "dynamic", "max": 1.5, "top_p": 0.6, "kl": "plain", "layers": "8-15"}}
                                     the same with all of its options
    "none", "" or {}                 no steer, even if the config has a default

A number has ASCII digits, a sign, a fraction and an exponent. ``value_limits`` bounds the size of a
value. If a steer is given several times with the same options, its strengths are added; a dynamic
steer may be given once.
"""

from vllm_steer.request.dose_cache import DoseCache
from vllm_steer.request.options import SteerAttributes, read_dose
from vllm_steer.request.resolution import check_request, resolve

__all__ = ["DoseCache", "SteerAttributes", "check_request", "read_dose", "resolve"]
