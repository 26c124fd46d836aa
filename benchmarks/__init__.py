"""The benchmarks: what the runtime does, beside what the machine could do and what its peers do.

Only `micro` imports the runtime. Everything else here runs in any interpreter that has numpy, because the same cases
are measured in the environments of the peers, where this package is not installed.
"""
