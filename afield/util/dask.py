"""`dask_get` and callbacks, also under the names of `ray.util.dask`; see `afield.libraries.dask_scheduler`."""

from __future__ import annotations

from afield.libraries.dask_callbacks import ProgressBarCallback, RayDaskCallback
from afield.libraries.dask_scheduler import dask_get
from afield.libraries.dask_scheduler import dask_get as ray_dask_get
from afield.libraries.dask_scheduler import disable_dask as disable_dask_on_ray
from afield.libraries.dask_scheduler import enable_dask as enable_dask_on_ray

__all__ = [
    "ProgressBarCallback",
    "RayDaskCallback",
    "dask_get",
    "disable_dask_on_ray",
    "enable_dask_on_ray",
    "ray_dask_get",
]
