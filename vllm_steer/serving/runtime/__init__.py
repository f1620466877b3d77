"""Steers that come and go while vLLM serves.

reserved_bank  a worker: reads a steer beside the steps, and writes it between two of them
engine_core    an engine core: which steers stay, and where they are placed
loading        the frontend: all engines have a steer, or none
names          the frontend: the names that a request is resolved by
listing        what is loaded, as data
engines        how a frontend calls its engines
server         a server's part; ``shared_folder`` is that of its API servers
offline        the same for an ``LLM``
"""
