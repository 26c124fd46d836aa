"""`register_joblib`; see `afield.libraries.joblib_backend`."""

from __future__ import annotations

from afield.libraries.joblib_backend import register_joblib

__all__ = ["register_joblib"]
