"""Training steps with optax: the task's loss plus the L1 penalties of the layers, running statistics carried along.

A step is a pure function `step(state, batch, key) -> (state, metrics)` that knows no particular model. What the model
is asked and what is learned from its answer is the user's `loss`:

    def loss(call, batch, train):                       # returns the loss of a batch and a dictionary of metrics
        logits = call(batch["image"], train=train)      # linen: the model's apply; nnx: the model itself
        return cross_entropy(logits, batch["label"]), {"accuracy": ...}

    state = linen_init(model, tx, key, images, train=False)
    run = jax.jit(epoch(linen_step(model, loss, tx)))   # one lax.scan, the data on the device
    state, metrics = run(state, data, order, key)       # order: [steps, batch] indices; metrics: [steps] arrays
    jax.vmap(run, in_axes=(0, None, 0, 0))              # several seeds side by side

A loss with an argument `key` is given a key of its own; it may return a `Mean` (sum and weight) or a `Sum` where a number
stands, and a batch may hold `Shared` parts, so that micro-batches are exactly the whole batch.

Many devices: the batch is spread over an axis of a mesh, and everything is still that of the whole batch, running
statistics too, because XLA sums over the devices what one device sums over the examples.

    mesh = jax.make_mesh((8,), ("data",))
    state = place(state, mesh)                          # replicated, or sharded as Flax's metadata or `specs` say
    step = jax.jit(linen_step(model, loss, tx, mesh=mesh), donate_argnums=0)
    state, metrics = step(state, shard(batch, mesh))    # one device's numbers, but for rounding

Inside `jax.shard_map` a device sees its own examples alone. There fields name the mapped axis (`"@data n ..."`), and
both the loss (`lax.pmean(loss, "data")`) and the gradient are averaged over it, the gradient before all else in `tx`:
`optax.chain(optax.stateless(lambda grads, params: lax.pmean(grads, "data")), tx)`. One of the two is not enough. Under
`check_vma=True`, the default, JAX itself sums the gradients of replicated parameters: of N local losses, which
averaging afterwards leaves N times too large. Under `check_vma=False` it does not, and the gradient of the averaged
loss is each device's own. With both averages, either setting is right.
"""

from normjax.train._batch import Shared
from normjax.train._report import KeyedLoss, Mean, Sum
from normjax.train._step import STATISTICS, Evaluation, Recalibration, State, Step, epoch
from normjax.train.linen import linen_eval, linen_init, linen_recalibrate, linen_step
from normjax.train.mesh import place, shard, shardings
from normjax.train.nnx import nnx_eval, nnx_init, nnx_recalibrate, nnx_step, nnx_update

__all__ = ["STATISTICS", "State", "Step", "epoch", "place", "shard", "shardings"]
__all__ += ["Evaluation", "KeyedLoss", "Mean", "Recalibration", "Shared", "Sum"]
__all__ += ["linen_eval", "linen_init", "linen_recalibrate", "linen_step"]
__all__ += ["nnx_eval", "nnx_init", "nnx_recalibrate", "nnx_step", "nnx_update"]
