"""The device function that folds a tile of keys into a running softmax."""

import triton
import triton.language as tl

from mem_triton.ops.memory_attention.fused.kernel_parts import LOG2E, Softmax, load_keys, load_values


@triton.jit
def attend_tile(q, softmax, k, v, token, live, visible, scales, bias, logits, HEAD, FORMAT: tl.constexpr):
    """The running softmax with a tile of keys and values in it.

    token: int64 [TILE], where each token's channels begin. visible: [BLOCK_M, TILE] or broadcastable.
    scales: if FORMAT, of keys as in ``load_keys``, and those of values [TILE]; bias: [TILE], a scalar or None, in base
    2.
    """
    dtype: tl.constexpr = q[0].dtype
    x = tl.dot(q[0], load_keys(k, token, live, scales, dtype, 0, HEAD, FORMAT), input_precision="ieee")
    if HEAD.REST:
        x = tl.dot(q[1], load_keys(k, token, live, scales, dtype, 1, HEAD, FORMAT), x, input_precision="ieee")
    if logits.soft_cap is not None:
        x = x * (logits.scale / logits.soft_cap)
        e = tl.exp(-2.0 * tl.abs(x))
        tanh = (1.0 - e) / (1.0 + e)
        x = tl.where(x < 0, -tanh, tanh) * (logits.soft_cap * LOG2E)
    else:
        x = x * (logits.scale * LOG2E)
    if bias is not None:
        x += bias
    x = tl.where(visible, x, float("-inf"))
    highest = tl.maximum(softmax.top, tl.max(x, 1))
    base = tl.where(highest == float("-inf"), 0.0, highest)  # a row that has seen nothing yet
    weight = tl.exp2(x - base[:, None])
    shrink = tl.exp2(softmax.top - base)
    total = softmax.total * shrink + tl.sum(weight, 1)
    if FORMAT:
        weight *= scales[2][None, :]
    weight = weight.to(dtype)
    v0 = load_values(v, token, live, dtype, 0, HEAD, FORMAT)
    acc0, acc1 = tl.dot(weight, v0, softmax.acc0 * shrink[:, None], input_precision="ieee"), softmax.acc1
    if HEAD.REST:
        v1 = load_values(v, token, live, dtype, 1, HEAD, FORMAT)
        acc1 = tl.dot(weight, v1, acc1 * shrink[:, None], input_precision="ieee")
    return Softmax(highest, total, acc0, acc1)
