"""Moves: the framing of messages, authenticated channels between processes, the data plane between machines.

It knows bytes, messages and peers, and nothing of what they mean: tasks, objects and leases live above it. It imports
only afield's leaf modules.
"""

# From the repository root the folder is also reachable under its bare name; a second copy of every class would follow.
if __name__ != "afield.transport":
    raise ImportError(f"this package is imported as afield.transport, not as {__name__}", name=__name__)
