"""`dask_get`; see `afield.libraries.dask_scheduler`."""

from __future__ import annotations

from afield.libraries.dask_scheduler import dask_get

__all__ = ["dask_get"]
