"""The ops: score each instance, softmax the scores inside its bag, sum the instances by their weights.

Conventions of all of them:

- **Bags.**  ``x`` is `Bags`, which carry what follows, or a tensor: ``x [N, L]`` holds the instances of all bags
  back to back.  ``offsets [B + 1]``, int32 or int64 on the device of ``x``, starts at 0, never decreases and ends at
  N.  Bag b is ``x[offsets[b]:offsets[b + 1]]`` and may be empty.  ``offsets=None`` is one bag.  Offsets on the CPU are
  checked; elsewhere and under tracing wrong offsets give wrong numbers.
- **Parts.**  A `StreamedBag` in the place of ``x`` is read in pieces; ``offsets``, ``mask`` and what else has a row for
  each instance are those of the whole.
- **Mask.**  ``mask [N]``, bool or 0/1 of any type, non-zero = real.  A masked instance has weight 0,
  gradient 0 and scores or logits of -inf, whatever its row holds, NaN included.  A given score of -inf
  means the same for one head.  Other values in a floating-point mask, such as the 0 and -inf of one that
  is added to scores, are an error on the CPU; elsewhere they are not read, and count as real.
- **Empty bags**, and bags with every row masked: ``bag`` 0, ``lse`` -inf, indices -1.  Nothing becomes NaN.
- **Indices** are rows of ``x`` (int64), -1 for none.  The lowest index wins a tie; NaN beats every number.
- **Types.**  ``x`` is float16, bfloat16, float32 or float64; so are parameters, of the same type or another.
  Matrix products run in the type of ``x``, of autocast where it is on, or in a wider one: a CPU without units
  for a half type multiplies in float32.  ``scores``, ``lse`` and ``logits`` come in float32 (float64 if any
  input is), ``bag`` in the promoted type of ``x`` and the parameters.  Gradients come in each tensor's own type.
- **Layout.**  The rows of ``x`` may have any stride from L on; other layouts are copied by compiled kernels.
- **Linear layers** are an ``nn.Linear``, a pair ``(weight [out, in], bias [out] or None)``, or a weight.
- **Embedding.**  ``embed`` is the layer in front of the aggregator, ``Embed(linear, activation, dropout_p)``: instead
  of ``x_i`` the op takes ``h_i = drop(act(W x_i + b))``, in the type of matrix products, and L is E for all its other
  arguments and results.  Compiled kernels make ``h`` tile by tile, and in the backward again what they did
  not save (`saved_bytes`); `embed_instances` gives some of its rows.
- **Dropout.**  ``seed`` is an int64 tensor of one element on the device of ``x``, or an int; None draws it
  from PyTorch's default generator of that device.  The same seed drops the same units on every backend.
- **Backend.**  ``backend`` is auto, native, triton or reference; None is what ``use_backend`` or
  ``MILKERNELS_BACKEND`` says, auto otherwise.  ``auto`` takes a compiled kernel if one serves the call,
  else the reference; a backend asked for by name serves the call or raises `BackendUnavailable`.
- **Transforms.**  Compiled kernels are differentiable once, in reverse mode, by autograd; they work under
  ``torch.compile``, ``torch.export``, ``vmap`` and batched gradients.  Where torch.func (grad, vjp, jvp, jacrev,
  jacfwd, hessian) or forward mode differentiates by an argument, in a jit trace and in an export to ONNX, ``auto``
  takes the reference, which can do all of it, and is differentiable any number of times.
- **Errors.**  TypeError and ValueError name the argument and the value got.  No op synchronises with a GPU.
"""

from milkernels.ops import attention, classical, dual_stream, embedding, loss_attention, pooling, query, scores
from milkernels.ops.attention import *
from milkernels.ops.classical import *
from milkernels.ops.dual_stream import *
from milkernels.ops.embedding import *
from milkernels.ops.loss_attention import *
from milkernels.ops.pooling import *
from milkernels.ops.query import *
from milkernels.ops.scores import *

FAMILIES = (attention, classical, dual_stream, embedding, loss_attention, pooling, query, scores)
__all__ = [name for family in FAMILIES for name in family.__all__]
