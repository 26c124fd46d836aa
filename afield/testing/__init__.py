"""Testing programs that use afield: a plugin for pytest, and what its fixtures hand out.

Theory of operation. pytest loads `plugin` in every run on a machine where afield is installed, so that file imports pytest
and nothing else; a fixture that is used imports `runtimes` (starting and ending a runtime, and looking at what a test left
behind) and `devices` (faults of emulated devices). The user's guide is docs/testing.md.
"""
