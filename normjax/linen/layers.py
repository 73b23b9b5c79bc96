"""The faces of the layers in Flax linen: a description of `normjax/_layers` and a host of `host.py` each."""

import jax
from flax import linen as nn
from jax.typing import ArrayLike

from normjax._expect.arrays import require_real
from normjax._layers import (
    batch,
    conditional,
    evonorm,
    film,
    gdn,
    kalman,
    norm,
    presets,
    response,
    reversible,
    selu,
    spade,
    switchable,
    tokens,
    units,
    virtual,
)
from normjax.linen.host import Early, Host, Keeping

__all__ = ["BatchRenorm", "DivisiveNorm", "ExtendedBatchNorm", "LocalContextNorm", "Norm", "VarianceNorm"]
__all__ += ["GhostBatchNorm", "GhostTopKBatchNorm", "L1BatchNorm", "LinfBatchNorm", "LpBatchNorm"]
__all__ += ["LocalContrastNorm", "LocalResponseNorm", "PositionNorm", "RangeBatchNorm", "TopKBatchNorm"]
__all__ += ["GDN", "GRN", "TLU", "AlphaDropout", "Derf", "DyT", "EvoNormB0", "EvoNormS0", "FilterResponseNorm"]
__all__ += ["KalmanNorm", "PartialRMSNorm", "QKNorm", "RevIN", "ScaleNorm", "SwitchableNorm", "VirtualBatchNorm"]
__all__ += ["SPADE", "AdaIN", "AdaLN", "AdaLNZero", "ConditionalNorm", "FiLM"]


class Norm(norm.Norm, Keeping): ...


class BatchRenorm(presets.BatchRenorm, Keeping): ...


class DivisiveNorm(presets.DivisiveNorm, Keeping): ...


class L1BatchNorm(batch.L1BatchNorm, Keeping): ...


class LpBatchNorm(batch.LpBatchNorm, Keeping): ...


class TopKBatchNorm(batch.TopKBatchNorm, Keeping): ...


class LinfBatchNorm(batch.LinfBatchNorm, Keeping): ...


class VarianceNorm(presets.VarianceNorm, Keeping): ...


class ExtendedBatchNorm(presets.ExtendedBatchNorm, Keeping): ...


class PositionNorm(presets.PositionNorm, Keeping): ...


class LocalContextNorm(presets.LocalContextNorm, Keeping): ...


class GhostBatchNorm(batch.GhostBatchNorm, Keeping): ...


class RangeBatchNorm(batch.RangeBatchNorm, Keeping): ...


class GhostTopKBatchNorm(batch.GhostTopKBatchNorm, Keeping): ...


class LocalResponseNorm(presets.LocalResponseNorm, Host): ...


class LocalContrastNorm(presets.LocalContrastNorm, Host): ...


class TLU(units.TLU, Host): ...


class DyT(units.DyT, Host): ...


class Derf(units.Derf, Host): ...


class EvoNormB0(evonorm.EvoNormB0, Keeping): ...


class EvoNormS0(evonorm.EvoNormS0, Host): ...


class GRN(units.GRN, Host): ...


class GDN(gdn.GDN, Host): ...


class FilterResponseNorm(response.FilterResponseNorm, Host): ...


class ScaleNorm(tokens.ScaleNorm, Host): ...


class PartialRMSNorm(tokens.PartialRMSNorm, Host): ...


class QKNorm(tokens.QKNorm, Host): ...


class VirtualBatchNorm(virtual.VirtualBatchNorm, Host): ...


class RevIN(reversible.RevIN, Early): ...


class AdaIN(conditional.AdaIN, Host): ...


class ConditionalNorm(conditional.ConditionalNorm, Keeping): ...


class FiLM(film.FiLM, Keeping): ...


class AdaLN(film.AdaLN, Keeping): ...


class AdaLNZero(film.AdaLNZero, Keeping): ...


class SPADE(spade.SPADE, Keeping): ...


class AlphaDropout(selu.AlphaDropout, Host):
    @nn.compact
    def __call__(self, x: ArrayLike, deterministic: bool | None = None, rng: jax.Array | None = None) -> jax.Array:
        """Drops elements of x, unless `deterministic`, by the collection's random key or by `rng`."""
        x = require_real(x, "AlphaDropout")
        if self._passes(bool(nn.merge_param("deterministic", self.deterministic, deterministic))):
            return x
        return self._dropped(x, self.make_rng(self.rng_collection) if rng is None else rng)


class SwitchableNorm(switchable.SwitchableNorm, Keeping): ...


class KalmanNorm(kalman.KalmanNorm, Keeping): ...
