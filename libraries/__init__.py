"""Libraries over the public API alone: shuffle, workflow, collectives and what else can be built on futures.

Nothing below imports them, and they import nothing of the runtime's inside: each is what a user could have written.
"""

# From the repository root the folder is also reachable under its bare name; a second copy of every class would follow.
if __name__ != "afield.libraries":
    raise ImportError(f"this package is imported as afield.libraries, not as {__name__}", name=__name__)
