"""Checkpoints of normalization layers to and from Flax, PyTorch, Keras, Haiku and Equinox, as dictionaries of arrays.

    records, rest = read(model.state_dict(), "torch", {"*": {"eps": 1e-3}, "head/norm": {"kind": "rms"}})
    variables = write({"BatchNorm_0": records["layer1/0/bn1"]}, "linen")
    layer = normjax.linen.BatchNorm(**arguments(records["layer1/0/bn1"], "linen"))

Between the libraries stands one `Record` a layer, under its path ("layer1/0/bn1", slashes in every library). Entries that
belong to no normalization layer come back as `rest`, in the form and under the path in which they came; conv kernels are
transposed by somebody else. Weights under weight norm or spectral norm have `read_weights` and `write_weights`, recurrent
cells `read_cells` and `write_cells`. Nothing here imports any of the libraries. normjax's own layers are "linen" and "nnx".

|            | linen, nnx             | torch               | keras             | haiku             | equinox              |
|------------|------------------------|---------------------|-------------------|-------------------|----------------------|
| dictionary | variables; pure_dict   | state_dict          | path: value       | params, state     | attribute: value     |
| scale      | scale                  | weight              | gamma; rms: scale | scale             | weight               |
| bias       | bias                   | bias                | beta              | offset            | bias                 |
| mean       | mean                   | running_mean        | moving_mean       | mean_ema/average  | batch_state_index[0] |
| var        | var                    | running_var         | moving_variance   | var_ema/average   | batch_state_index[1] |
| updates    | mean_count, var_count  | num_batches_tracked | none              | counter           | batch_counter        |
| variance   | biased                 | unbiased            | biased            | biased            | biased               |
| averaging  | exponential            | exponential         | exponential       | debiased          | debiased             |
| momentum   | old value's, 0.99      | new value's, 0.1    | old value's, 0.99 | old value's       | old value's, 0.99    |
| epsilon    | 1e-6; batch 1e-5       | 1e-5; rms 2 ** -23  | 1e-3; rms 1e-6    | 1e-5              | 1e-5                 |

Averaging. A debiased average is sum / (1 - momentum ** updates); `Record.mean` and `Record.var` are always the average
itself, which inference uses. Haiku keeps average and sum (`hidden`), Equinox the sum alone. Any other average goes into
these two as that of 2 ** 30 updates, whose debiasing divides by one. normjax counts only if debiased or cumulative; torch is
cumulative where momentum is None. Equinox's mode "ema" keeps `ema_state_index` and `ema_first_time_index` instead.

Variance. Inference takes it as it stands. What training in torch adds is n / (n - 1) times what training elsewhere adds,
n elements behind a batch's statistics; `elements=n` undoes it, exactly once the initial 1 is forgotten. A layer of normjax
with `unbiased=True` goes on as torch does.

Shapes. Haiku's batch norm keeps singleton axes, (1, 1, 1, c): reading drops them, writing takes `shape=(1, 1, 1, -1)`.
Nothing is transposed: a torch or Equinox layer norm over (c, h, w) is not one over (h, w, c). nnx wants `reshape(-1)`.

What is lost: Flax and Keras have no place for the number of updates. torch and Equinox learn both scale and bias or
neither (batch, group, instance), so that a missing one is written as ones or zeros.
"""

from normjax.interop._boxes import text_keys
from normjax.interop._layer import Record
from normjax.interop._libraries import FOREVER, KINDS
from normjax.interop._weight import WeightRecord
from normjax.interop.cells import CellRecord, read_cells, write_cells
from normjax.interop.convert import arguments, read, write
from normjax.interop.weights import read_weights, write_weights

__all__ = [
    "FOREVER",
    "KINDS",
    "CellRecord",
    "Record",
    "WeightRecord",
    "arguments",
    "read",
    "read_cells",
    "read_weights",
]
__all__ += ["text_keys", "write", "write_cells", "write_weights"]
