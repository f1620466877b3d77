"""Many mixed requests against a real server, with steers loaded and unloaded between them.

cases     the distinct requests, and the answer of each when it runs alone
contents  the steers that are loaded, and the server's steer config
changes   loads, replacements and unloads, and what each name meant when
clients   the clients: some leave early, some without a word
checks    what must hold at the end: nothing leaked, memory flat
serve     the server process, also of vLLM's second model runner on a CPU
run       the command
"""
