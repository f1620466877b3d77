"""Settings of requests whose strengths follow from the text, for tiny random models."""

from engines import Setting, dynamic

SETTINGS: tuple[Setting, ...] = (
    {"push": dynamic(1.0, top_p=0.9)},
    {"nudge": dynamic(-0.5, top_p=0.8)},
    {"lean": dynamic(0.5, top_p=0.8)},
    {"turn": dynamic(6.0, top_p=0.6)},
    {"spin": dynamic(-5.0, top_p=0.8)},
    {"bend": dynamic(5.0, top_p=0.8)},
    {"twist": dynamic(4.0, layers="0")},
    {"steps": dynamic(3.0, top_p=0.8)},
    {"walk": dynamic(-3.0, top_p=0.9)},
    {"plain": dynamic(20.0, top_p=0.9)},
    {"dummy": dynamic(-20.0, top_p=0.9)},
    {"wide": dynamic(10.0, top_p=0.9)},
    {"bias": dynamic(10.0, top_p=0.9)},
    {"tilt": dynamic(-3.0, top_p=0.9)},
    {"steps": dynamic(3.0, kl="authors", top_p=0.9)},
    {"turn": dynamic(4.0), "twist": dynamic(-6.0)},
    {"push": dynamic(1.0, top_p=0.9), "spin": dynamic(4.0), "dummy": dynamic(15.0, top_p=0.9)},
    {"steps": dynamic(2.0), "walk": dynamic(2.0), "turn": 3.0, "tilt": 1.0},
    {"dummy": dynamic(15.0, top_p=0.9), "push": {"strength": 1.0, "phase": "generation"}},
    {"walk": dynamic(2.0), "steps": {"strength": 2.0, "schedule": "start"}, "dummy": 1.0},
)
"""Every kind, site and mode with a dynamic strength, alone and together, beside fixed doses."""
