"""The ownership core under a deterministic simulator, and under an exhaustive explorer: `python -m tests.sim`.

- `network`: ordered channels between each two processes, with duplicates and losses.
- `participant`: a simulated process: a real `OwnershipTable` and a model of the shell around it.
- `world`: all of them, the store, and the truth about every value (`values`).
- `checkers`: what must hold after every event, and what must be left in the end (nothing).
- `simulate`: random programs, delays and deaths from a seed.
- `explore`: every interleaving of small scripts (`scenarios`).
"""
