"""A soak: random programs against the runtime, beside a NumPy model that says what every value must be.

`values` describes values and computes them without afield; `program` is what one thread of a driver does with futures of such
values; `faults` kills, loses and stops what can be; `run` puts a session, threads and faults together and counts.

    python -m tests.soak --seed 7 --minutes 60 --faults
"""
