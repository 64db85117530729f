"""Attention kernels: one function, several backends, and closed forms that avoid every N x N tensor."""

from attnctl.kernels.closed_forms import (
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
from attnctl.kernels.columns import columns
from attnctl.kernels.dispatch import Backend, Plain, attention, backends, choose, plain, probe

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
    "perturb",
    "plain",
    "probe",
    "query_mean",
    "temperature",
    "uniform",
]
