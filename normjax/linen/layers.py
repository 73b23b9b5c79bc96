"""The faces of the layers in Flax linen: a description of `normjax/_layers` and a host of `host.py` each."""

import jax
from flax import linen as nn
from jax.typing import ArrayLike

from normjax import _layers as described
from normjax._expect.arrays import require_real
from normjax.linen.host import Early, Host, Keeping

__all__ = ["BatchRenorm", "DivisiveNorm", "ExtendedBatchNorm", "LocalContextNorm", "Norm", "VarianceNorm"]
__all__ += ["GhostBatchNorm", "GhostTopKBatchNorm", "L1BatchNorm", "LinfBatchNorm", "LpBatchNorm"]
__all__ += ["LocalContrastNorm", "LocalResponseNorm", "PositionNorm", "RangeBatchNorm", "TopKBatchNorm"]
__all__ += ["GDN", "GRN", "TLU", "AlphaDropout", "Derf", "DyT", "EvoNormB0", "EvoNormS0", "FilterResponseNorm"]
__all__ += ["KalmanNorm", "PartialRMSNorm", "QKNorm", "RevIN", "ScaleNorm", "SwitchableNorm", "VirtualBatchNorm"]
__all__ += ["SPADE", "AdaIN", "AdaLN", "AdaLNZero", "AddNorm", "ConditionalNorm", "FiLM"]


class Norm(described.norm.Norm, Keeping): ...


class BatchRenorm(described.presets.BatchRenorm, Keeping): ...


class DivisiveNorm(described.presets.DivisiveNorm, Keeping): ...


class L1BatchNorm(described.batch.L1BatchNorm, Keeping): ...


class LpBatchNorm(described.batch.LpBatchNorm, Keeping): ...


class TopKBatchNorm(described.batch.TopKBatchNorm, Keeping): ...


class LinfBatchNorm(described.batch.LinfBatchNorm, Keeping): ...


class VarianceNorm(described.presets.VarianceNorm, Keeping): ...


class ExtendedBatchNorm(described.presets.ExtendedBatchNorm, Keeping): ...


class PositionNorm(described.presets.PositionNorm, Keeping): ...


class LocalContextNorm(described.presets.LocalContextNorm, Keeping): ...


class GhostBatchNorm(described.batch.GhostBatchNorm, Keeping): ...


class RangeBatchNorm(described.batch.RangeBatchNorm, Keeping): ...


class GhostTopKBatchNorm(described.batch.GhostTopKBatchNorm, Keeping): ...


class LocalResponseNorm(described.presets.LocalResponseNorm, Host): ...


class LocalContrastNorm(described.presets.LocalContrastNorm, Host): ...


class TLU(described.units.TLU, Host): ...


class DyT(described.units.DyT, Host): ...


class Derf(described.units.Derf, Host): ...


class EvoNormB0(described.evonorm.EvoNormB0, Keeping): ...


class EvoNormS0(described.evonorm.EvoNormS0, Host): ...


class GRN(described.units.GRN, Host): ...


class GDN(described.gdn.GDN, Host): ...


class FilterResponseNorm(described.response.FilterResponseNorm, Host): ...


class ScaleNorm(described.tokens.ScaleNorm, Host): ...


class PartialRMSNorm(described.tokens.PartialRMSNorm, Host): ...


class QKNorm(described.tokens.QKNorm, Host): ...


class AddNorm(described.residual.AddNorm, Host): ...


class VirtualBatchNorm(described.virtual.VirtualBatchNorm, Host): ...


class RevIN(described.reversible.RevIN, Early): ...


class AdaIN(described.conditional.AdaIN, Host): ...


class ConditionalNorm(described.conditional.ConditionalNorm, Keeping): ...


class FiLM(described.film.FiLM, Keeping): ...


class AdaLN(described.film.AdaLN, Keeping): ...


class AdaLNZero(described.film.AdaLNZero, Keeping): ...


class SPADE(described.spade.SPADE, Keeping): ...


class AlphaDropout(described.selu.AlphaDropout, Host):
    @nn.compact
    def __call__(self, x: ArrayLike, deterministic: bool | None = None, rng: jax.Array | None = None) -> jax.Array:
        """Drops elements of x, unless `deterministic`, by the collection's random key or by `rng`."""
        x = require_real(x, "AlphaDropout")
        if self._passes(bool(nn.merge_param("deterministic", self.deterministic, deterministic))):
            return x
        return self._dropped(x, self.make_rng(self.rng_collection) if rng is None else rng)


class SwitchableNorm(described.switchable.SwitchableNorm, Keeping): ...


class KalmanNorm(described.kalman.KalmanNorm, Keeping): ...
