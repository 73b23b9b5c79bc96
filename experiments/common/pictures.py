"""Pictures: joint histograms of two units, divisive norm with ReLU as an activation function, pieces of images."""

from collections.abc import Mapping

import jax
import numpy as np
from matplotlib.figure import Figure

from experiments.common import images
from experiments.common.pairs import Dataset, Enlarge
from normjax import Normalizer, diagnostics, normalize


def draw_histograms(pairs: Mapping[str, str], z: Mapping[str, np.ndarray]) -> Figure:
    """Joint histograms of two units before normalization, without and with a star; a column for each pair of rows.

    The two units are a typical pair of their row: their |correlation| is the closest to the row's mean.

    Args:
      pairs: {starred row: plain row}.
      z: pre-activations of each row, [samples, units].
    """
    figure = Figure(figsize=(3.4 * len(pairs), 6.8), layout="constrained")
    axes = figure.subplots(2, len(pairs), squeeze=False)  # each on its own scale, tens of times smaller with a star
    for column, (star, plain) in enumerate(pairs.items()):
        for ax, name in zip(axes[:, column], (plain, star), strict=True):
            units = z[name]
            if not np.isfinite(units).all():
                ax.set(title=f"{name}: diverged")
                continue
            mean = diagnostics.correlation(units)
            if not np.isfinite(mean):
                ax.set(title=f"{name}: no two units alive")
                continue
            r = np.abs(diagnostics.correlation_matrix(units))
            i, j = np.triu_indices(len(r), k=1)
            typical = np.nanargmin(np.abs(r[i, j] - mean))
            i, j = i[typical], j[typical]
            found = diagnostics.joint_histogram(units[:, i], units[:, j], bins=60)
            ax.pcolormesh(found.a_edges, found.b_edges, found.counts.T, norm="log", cmap="viridis")
            ax.set(title=f"{name}: |r| = {r[i, j]:.2f}", xlabel=f"unit {i}", ylabel=f"unit {j}")
    return figure


def draw_responses() -> Figure:
    """Draws ReLU(divisive norm) as a function of its centre, for several sigma.

    Source: the figure of Ren et al. 2017 that reads normalization as an activation function.
    """
    figure = Figure(figsize=(11, 4), layout="constrained")
    centre = np.linspace(-2, 8, 501, dtype=np.float32)
    for ax, neighbour in zip(figure.subplots(1, 3, sharey=True), (0.0, 1.0, 4.0), strict=True):
        beside = np.full_like(centre, neighbour)
        x = np.stack([beside, centre, beside], axis=1)[..., None]  # [n, w, c]: a row of 3 pixels
        for k, sigma in enumerate((0.1, 0.5, 1.0, 2.0, 4.0)):
            y = normalize(x, Normalizer("...:3 c", "...:3 c", eps=sigma**2)).y[:, 1, 0]
            ax.plot(centre, jax.nn.relu(y), color=f"C{k}", label=f"sigma {sigma:g}")
        ax.plot(centre, np.maximum(centre, 0), "k:", lw=1, label="ReLU alone")
        ax.set(title=f"both neighbours {neighbour:g}", xlabel="centre", ylim=(-0.05, 1.5))
        ax.grid(alpha=0.3)
    figure.axes[0].set_ylabel("ReLU(divisive norm)")
    figure.axes[0].legend(fontsize=9)
    return figure


def draw_images(dataset: Dataset, enlarge: Mapping[str, Enlarge], width: int = 72) -> Figure:
    """A piece of the first image of each set, enlarged in each way, and the truth, with the image's scores.

    The piece is the one of `width` pixels in which bicubic errs the most.
    """
    figure = Figure(figsize=(2.5 * (len(enlarge) + 1), 2.8 * len(dataset.tests)), layout="constrained")
    axes = figure.subplots(len(dataset.tests), len(enlarge) + 1, squeeze=False)
    for line, (test, pairs) in zip(axes, dataset.tests.items(), strict=True):
        name, pair = next(iter(pairs.items()))
        corner = images.worst(np.square(pair.high - pair.low), width)
        piece = tuple(slice(c, c + width) for c in corner)
        for ax, (row, f) in zip(line, enlarge.items(), strict=False):
            image = f(pair.low.astype(np.float32))
            psnr, ssim = images.score(image, pair.high, dataset.zoom).values()
            ax.imshow(np.clip(image, 0, 1)[piece], cmap="gray", vmin=0, vmax=1)
            ax.set_title(f"{row}: {psnr:.2f} dB, {ssim:.4f}", fontsize=9)
        line[-1].imshow(pair.high[piece], cmap="gray", vmin=0, vmax=1)
        line[-1].set_title(f"{test}: {name}", fontsize=9)
    for ax in figure.axes:
        ax.set(xticks=[], yticks=[])
    return figure
