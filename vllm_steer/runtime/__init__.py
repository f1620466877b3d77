"""Steers that come and go while an engine serves; nothing of vLLM.

residency  which steers are in the reserved device memory, and where
registry   the names of what is loaded, in a file that all API servers of a server read
steer_file a steer from a path or from bytes, checked, and stored by its content
refusal    why a change was refused, with its HTTP status
"""
