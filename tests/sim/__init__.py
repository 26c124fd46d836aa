"""The ownership core under a deterministic simulator, and under an exhaustive explorer: `python -m tests.sim`.

- `network`: ordered channels between each two processes, with duplicates and losses.
- `world`: simulated processes, each with a real `OwnershipTable` and a model of the shell around it.
- `checkers`: what must hold after every event, and what must be left in the end (nothing).
- `simulate`: random programs, delays and deaths from a seed.
- `explore`: every interleaving of small scripts (`scenarios`).
"""
