"""The tests. What each kind proves is told in CONTRIBUTING.md."""
