"""Attention kernels: one function, several backends, and closed forms that avoid every N x N tensor."""

from attnctl.kernels.dispatch import Backend, Plain, attention, backends, choose, plain, probe
from attnctl.kernels.maps import columns, linear_rows, query_rows
from attnctl.kernels.perturbation.closed_forms import (
    argmax,
    blur_queries,
    identity,
    image_block,
    image_rows,
    perturb,
    query_mean,
    temperature,
    uniform,
)

__all__ = [
    "Backend",
    "Plain",
    "argmax",
    "attention",
    "backends",
    "blur_queries",
    "choose",
    "columns",
    "identity",
    "image_block",
    "image_rows",
    "linear_rows",
    "perturb",
    "plain",
    "probe",
    "query_mean",
    "query_rows",
    "temperature",
    "uniform",
]
