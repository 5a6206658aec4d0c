"""The kernel that weighs the tokens of a reference. Logits never leave the program; everything is fp32."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["tokens"])  # no new variant for a new length while encoding
def selection_weights_kernel(
    q,
    k,
    valid,
    out,
    scale,
    tokens,
    stride_q_batch,
    stride_q_token,
    stride_q_head,
    stride_k_batch,
    stride_k_token,
    stride_k_head,
    stride_valid,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    NORMALIZE: tl.constexpr,
    TOKENS: tl.constexpr,
    QUERIES: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    """Grid (references, KV heads). TOKENS: a power of two that holds all tokens. out: fp32 [B, Hkv, tokens].

    A program walks its head's queries QUERIES at a time and folds them into the running log-sum-exp of every token.
    Queries that are not valid add exp(-inf) = 0, so padding changes nothing.
    """
    batch, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    token = tl.arange(0, TOKENS)
    there = token < tokens
    real = there
    if valid is not None:
        real = tl.load(valid + batch * stride_valid + token, mask=there, other=0) != 0
    largest = tl.full([TOKENS], -float("inf"), tl.float32)
    total = tl.zeros([TOKENS], tl.float32)
    keys = k + batch * stride_k_batch + head * stride_k_head

    for step in range(GROUP * tl.cdiv(tokens, QUERIES)):
        query_head = head * GROUP + step % GROUP
        query = step // GROUP * QUERIES + tl.arange(0, QUERIES)
        looks = query < tokens
        if valid is not None:
            looks = tl.load(valid + batch * stride_valid + query, mask=looks, other=0) != 0
        queries = q + batch * stride_q_batch + query_head * stride_q_head
        logits = tl.zeros([QUERIES, TOKENS], tl.float32)
        for begin in range(0, HEAD_DIM, CHANNELS):
            channel = begin + tl.arange(0, CHANNELS)
            inside = channel < HEAD_DIM
            x = tl.load(
                queries + query[:, None] * stride_q_token + channel[None, :],
                mask=looks[:, None] & inside[None, :],
                other=0.0,
            )
            y = tl.load(
                keys + token[None, :] * stride_k_token + channel[:, None],
                mask=real[None, :] & inside[:, None],
                other=0.0,
            )
            logits = tl.dot(x, y, logits, input_precision="ieee")
        logits = tl.where(real[None, :], logits * scale, -float("inf"))
        if NORMALIZE:
            top = tl.max(logits, axis=1)
            top = tl.where(top == -float("inf"), 0.0, top)  # nobody to look at: the row is not valid either
            seen = tl.sum(tl.exp(logits - top[:, None]), axis=1)
            logits -= (top + tl.log(tl.where(looks, seen, 1.0)))[:, None]
        logits = tl.where(looks[:, None], logits, -float("inf"))
        larger = tl.maximum(largest, tl.max(logits, axis=0))
        base = tl.where(larger == -float("inf"), 0.0, larger)
        total = total * tl.exp(largest - base) + tl.sum(tl.exp(logits - base[None, :]), axis=0)
        largest = larger

    weight = tl.where(total > 0, largest + tl.log(tl.where(total > 0, total, 1.0)), -float("inf"))
    place = (batch * tl.num_programs(1) + head) * tokens + token
    tl.store(out + place, tl.where(real, weight, -float("inf")), mask=there)
