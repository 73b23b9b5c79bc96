"""The faces of the layers in Flax linen: a description of `normjax/_layers` and a host of `host.py` each."""

from normjax._layers import kalman, norm, switchable, units
from normjax.linen.host import Host, Keeping

__all__ = [
    "GRN",
    "TLU",
    "Derf",
    "DyT",
    "EvoNormB0",
    "EvoNormS0",
    "KalmanNorm",
    "Norm",
    "SwitchableNorm",
]


class Norm(norm.Norm, Keeping): ...


class TLU(units.TLU, Host): ...


class DyT(units.DyT, Host): ...


class Derf(units.Derf, Host): ...


class EvoNormB0(units.EvoNormB0, Keeping): ...


class EvoNormS0(units.EvoNormS0, Host): ...


class GRN(units.GRN, Host): ...


class SwitchableNorm(switchable.SwitchableNorm, Keeping): ...


class KalmanNorm(kalman.KalmanNorm, Keeping): ...
