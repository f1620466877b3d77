"""Whether and how steering works with one model on this machine.

``environment`` looks at what is installed, ``architecture`` at the model's config, ``parity`` at a
real engine beside Hugging Face, ``memory`` at what steers take on the device. Each gives findings.
"""

from vllm_steer.doctor.finding import Finding, State

__all__ = ["Finding", "State"]
