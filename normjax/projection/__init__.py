"""Weights held at a norm: optax transformations for layers that a normalizer makes blind to the scale of their weights.

Where f(c W) = f(W), the gradient at c W is that at W over c. A gradient step eta at norm |W| then turns the layer as far as
eta / |W| ** 2 does at norm 1 (eta / |W| for steps that do not scale with the gradient: sign, Adam); and since the gradient
is orthogonal to W, every step makes the norm grow: |W + dW| ** 2 = |W| ** 2 + |dW| ** 2. So the norm is a learning rate
that nobody chose. `project` holds it, `norm_schedule` chooses it, weight decay shrinks it, and `scale_by_weight_norm` does
without weight decay what weight decay does to it.

`Kernels` says which weights, and what one norm of them is taken over (`normjax.selection`). A transformation comes last in
`optax.chain`, unless it says otherwise. `effective_learning_rates` gives them by path; the formula, of numbers, is
`normjax.diagnostics.effective_learning_rate`.
"""

from normjax.projection._update import ProjectState
from normjax.projection.affine import project_affine, pull_affine
from normjax.projection.hold import bounded_norm, norm_schedule, project, project_after
from normjax.projection.rates import effective_learning_rates, equilibrium_norm, scale_by_weight_norm
from normjax.selection import Kernels, norms

__all__ = ["Kernels", "ProjectState", "bounded_norm", "effective_learning_rates", "equilibrium_norm", "norm_schedule"]
__all__ += ["norms", "project", "project_affine", "project_after", "pull_affine", "scale_by_weight_norm"]
