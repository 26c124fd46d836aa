"""Device backends: one small interface (`base`) and the two things that implement it (`cuda`, `emulated`).

Theory of operation. Code above this package is written against `base` and never asks which backend it has. Nothing is
imported here: the composition root imports the one backend that it was asked for, so that a machine without CUDA never
touches CuPy, and asking for CUDA where there is none is an error and not a fallback.
"""
