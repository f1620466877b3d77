"""Room on the device for the strengths of dynamic doses: one number per dose and generation step.

A dose keeps its numbers as long as its request lives, wherever vLLM takes the request meanwhile:
tokens that are computed again after a preemption are steered as they were.
"""

import torch


class StrengthPool:
    """``values [N]`` float32 in ranges; doubles when full, never on the way of a step."""

    def __init__(self, device: torch.device, size: int = 4096) -> None:
        self.values = torch.zeros(size, device=device)
        self._free = [(0, size)]

    @property
    def num_taken(self) -> int:
        """Numbers in use."""
        return self.values.numel() - sum(length for _, length in self._free)

    def take(self, length: int) -> int:
        """Where a range of ``length`` zeros begins."""
        for place, (start, room) in enumerate(self._free):
            if room >= length:
                self._free[place : place + 1] = (
                    [(start + length, room - length)] if room > length else []
                )
                self.values[start : start + length] = 0.0
                return start
        size = self.values.numel()
        self.values = torch.cat([self.values, self.values.new_zeros(max(size, length))])
        self.give_back(size, self.values.numel() - size)
        return self.take(length)

    def give_back(self, start: int, length: int) -> None:
        """Free a range that was taken."""
        ranges = sorted([*self._free, (start, length)])
        merged = ranges[:1]
        for begin, room in ranges[1:]:
            last, before = merged[-1]
            if last + before == begin:
                merged[-1] = (last, before + room)
            else:
                merged.append((begin, room))
        self._free = merged
