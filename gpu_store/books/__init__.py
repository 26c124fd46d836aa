"""The books of all tiers: which copy of which part of which object lies where, and what moves. Pure: decides, and does nothing.

`residency` is the facade; start there. What books and their shell have in common is `gpu_store.tiers`.
"""
