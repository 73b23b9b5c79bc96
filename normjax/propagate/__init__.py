"""Beliefs: means and variances that travel through a network beside its arrays, and how a kernel changes them.

`predict` takes the belief of a layer's output through an activation and a kernel to the next layer's input; `join` adds a
skip connection. `normjax.kalman` mixes what comes out with what a batch shows.

Which state is predicted from is where paper and code of Kalman normalization part. What enters the activation is y, believed
to be N(bias, scale ** 2); the published code feeds it a sample of the input's belief instead, which has not been normalized,
so that the predicted variance leaves the true one by factors from 1/5 to 20 within twenty layers. `predict` offers both by
name; "analytic" is right, and needs no sample.
"""

from normjax.propagate.beliefs import Activation, Belief, Filtered, activate, join, linear
from normjax.propagate.kernels import TRANSITIONS, predict

__all__ = ["TRANSITIONS", "Activation", "Belief", "Filtered", "activate", "join", "linear", "predict"]
