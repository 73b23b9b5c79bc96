"""The faces of the layers in Flax nnx: a description of `normjax/_layers` and a host of `host.py` each."""

from flax import nnx

from normjax._layers import kalman, norm, switchable, units
from normjax.nnx.host import Host, Keeping

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


@nnx.dataclass(eq=False)
class Norm(norm.Norm, Keeping): ...


@nnx.dataclass(eq=False)
class TLU(units.TLU, Host): ...


@nnx.dataclass(eq=False)
class DyT(units.DyT, Host): ...


@nnx.dataclass(eq=False)
class Derf(units.Derf, Host): ...


@nnx.dataclass(eq=False)
class EvoNormB0(units.EvoNormB0, Keeping): ...


@nnx.dataclass(eq=False)
class EvoNormS0(units.EvoNormS0, Host): ...


@nnx.dataclass(eq=False)
class GRN(units.GRN, Host): ...


@nnx.dataclass(eq=False)
class SwitchableNorm(switchable.SwitchableNorm, Keeping): ...


@nnx.dataclass(eq=False)
class KalmanNorm(kalman.KalmanNorm, Keeping): ...
