"""`register_joblib`, also under the name that `ray.util.joblib` has; see `afield.libraries.joblib_backend`."""

from __future__ import annotations

from afield.libraries.joblib_backend import register_joblib
from afield.libraries.joblib_backend import register_joblib as register_ray

__all__ = ["register_joblib", "register_ray"]
