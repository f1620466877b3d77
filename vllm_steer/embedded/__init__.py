"""The small model that is part of the package, the grammar of its training texts, and its steers.

Importing this package only defines the paths below.
"""

from pathlib import Path

MODEL: Path = Path(__file__).parent / "model"
"""Folder of the embedded Llama: about one million parameters, English, French, German, Spanish."""

STEERS: Path = Path(__file__).parent / "steers"
"""Folder of the steers fitted to it.

LM-Steers: sentiment, formality, french, german, spanish. Vectors that rotate (concept guidance):
french-vector, german-vector, formality-vector; that are added: formality-shift. Step deltas:
french-delta, german-delta.
"""

STEER_CONFIG: Path = Path(__file__).parent / "steers.yaml"
"""A steer config with all these steers and two presets."""

__all__ = ["MODEL", "STEERS", "STEER_CONFIG"]
