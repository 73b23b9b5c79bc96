"""Normalized kernels against the authors' own code: stored values and gradients."""

import functools
from typing import Any

import jax
import numpy as np

from normjax.weights import (
    bounded_weight_norm,
    norm_bound,
    scaled_weight_standardization,
    weight_centring,
    weight_norm,
    weight_standardization,
)
from tests.kernels import INF, close, quickly

# The authors' code, run by PyTorch in float64 on these arrays, laid out "o i ...": w, dv and dg for a cotangent. It is the
# layer_defs.py of Lubana et al. 2021 (whose torch.linalg.norm of three axes is vector_norm today), bwn.py, bwn_alt.py and
# weight_norm of Hoffer et al. 2018, the convolution of Qiao et al. 2019 and that of NFNets, once with tiny weights.


def golden_arrays():
    rng = np.random.default_rng(7)
    v, g, dw = rng.normal(0, 0.3, (2, 2, 1, 2)), np.array([0.5, 2.0]), rng.normal(size=(2, 2, 1, 2))
    v[0, 0, 0, 1] = -0.9  # the largest weight is not the largest magnitude
    return v.astype(np.float32), g.astype(np.float32), dw.astype(np.float32)


# fmt: off
GOLDEN: dict[str, tuple[list[float], list[float], list[float] | None]] = {
    "WN_self": (
        [0.000195796, -0.477491, -0.0436328, -0.14175, -0.525886, -1.14697, 0.0695639, 1.55013],
        [-0.261231, -0.101988, 0.280645, 0.256793, 1.46458, -1.27948, -0.252752, -0.438407],
        [0.448426, 1.04378]),
    "ScaledStdConv2d": (
        [0.379356, -0.713177, 0.279114, 0.0547073, -0.878066, -1.94197, 0.141926, 2.67811],
        [-0.775174, -0.18607, 0.484802, 0.476443, 2.724, -1.97835, -0.215995, -0.529655],
        [0.824066, 1.78616]),
    "WCConv2d": (
        [0.312632, -0.587738, 0.230021, 0.0450849, -0.132954, -0.294047, 0.02149, 0.405511],
        [-0.425718, -0.553987, 0.55633, 0.423375, 0.145165, -0.890717, 0.0104988, 0.735054],
        None),
    "bwn.py": (
        [0.00010217, -0.249165, -0.0227685, -0.073968, -0.274421, -0.598517, 0.0363002, 0.808899],
        [-0.136316, -0.053218, 0.146447, 0.134, 0.764265, -0.667644, -0.131894, -0.228803],
        [0.0920756, -0.0230189]),
    "bwn.py inf": (
        [9.80324e-05, -0.239074, -0.0218464, -0.0709724, -0.324425, -0.707578, 0.0429148, 0.956295],
        [-0.130748, -0.0400874, 0.13012, 0.0948026, 0.250724, -2.21308, -0.0695743, -1.54931],
        [0.0598036, -0.0149509]),
    "bwn_alt.py": (
        [0.000286091, -0.697696, -0.0637549, -0.207121, -0.192104, -0.418982, 0.0254114, 0.566257],
        [-0.381703, -0.149018, 0.410071, 0.375219, 0.535012, -0.467374, -0.09233, -0.16017],
        None),
    "bwn_alt.py l1": (
        [0.000411918, -1.00455, -0.0917953, -0.298215, -0.276594, -0.603257, 0.0365877, 0.815305],
        [-0.549582, -0.214558, 0.590426, 0.540246, 0.770318, -0.672932, -0.132938, -0.230615],
        None),
    "weight_norm l3": (
        [0.000203218, -0.495591, -0.0452868, -0.147123, -0.600263, -1.30919, 0.0794024, 1.76937],
        [-0.271037, -0.0898792, 0.271837, 0.218712, 0.936182, -1.84813, -0.136993, -1.04371],
        [0.465425, 1.1914]),
    "WS": (
        [0.767216, -1.44234, 0.564485, 0.110641, -0.443955, -0.981868, 0.0717583, 1.35406],
        [-1.56773, -0.376308, 0.980471, 0.963565, 1.37727, -1.00025, -0.109209, -0.26781],
        None),
    "NFNets": (
        [0.221481, -0.416378, 0.162957, 0.0319401, -0.512652, -1.1338, 0.0828621, 1.56359],
        [-0.452579, -0.108627, 0.283042, 0.278164, 1.59042, -1.15496, -0.126113, -0.309356],
        [0.481119, 1.04284]),
    "NFNets tiny": (
        [0.0312632, -0.0587738, 0.0230021, 0.00450849, -0.0531817, -0.117619, 0.00859599, 0.162205],
        [-21.2859, -27.6993, 27.8165, 21.1688, 29.033, -178.143, 2.09976, 147.011],
        [0.0679123, 0.108182]),
}
# fmt: on


def golden_functions(v):
    first = functools.partial(norm_bound, v, layout="o i ...")
    floor: dict[str, Any] = {"gain": 1.0, "eps": 1e-4 / 4, "eps_rule": "floor"}
    return {
        "WN_self": functools.partial(weight_norm, eps=1e-5, eps_rule="root"),
        "ScaledStdConv2d": functools.partial(scaled_weight_standardization, eps=1e-5, eps_rule="root"),
        "WCConv2d": weight_centring,
        "bwn.py": functools.partial(bounded_weight_norm, rho=first()),
        "bwn.py inf": functools.partial(bounded_weight_norm, p=INF, rho=first(p=INF)),
        "bwn_alt.py": functools.partial(bounded_weight_norm, rho=first(rule="mean")),
        "bwn_alt.py l1": functools.partial(bounded_weight_norm, rho=first(rule="mean", p=1)),
        "weight_norm l3": functools.partial(weight_norm, p=3),
        "WS": functools.partial(weight_standardization, eps=1e-5, eps_rule="root", unbiased=True),
        "NFNets": functools.partial(scaled_weight_standardization, **floor),
        "NFNets tiny": functools.partial(scaled_weight_standardization, **floor),
    }


def test_values_and_gradients_of_the_authors_code():
    v, g, dw = golden_arrays()

    @quickly
    def run(v, g, dw):
        out = {}
        for name, f in golden_functions(v).items():
            at = v * 0.002 if name == "NFNets tiny" else v
            if GOLDEN[name][2] is None:
                w, back = jax.vjp(lambda v, f=f: f(v, layout="o i ..."), at)
            else:
                w, back = jax.vjp(lambda v, g, f=f: f(v, g, layout="o i ..."), at, g)
            out[name] = (w, *back(dw))
        return out

    out = run(v, g, dw)
    assert out.keys() == GOLDEN.keys()
    for name, got in out.items():
        want = [a for a in GOLDEN[name] if a is not None]
        for ours, theirs in zip(got, want, strict=True):
            close(np.ravel(ours), theirs, 1e-5)
