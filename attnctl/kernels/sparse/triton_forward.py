"""The Triton program of block-sparse attention: one tile of queries, the key blocks of its list, an online softmax.

Imported only where Triton is there. Rows are found through each head's order while they are loaded, so nothing is laid
out beforehand; the text's keys come last, and every query sees them. The subset of the language is that which Triton's
interpreter runs on a CPU.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["forward"]


@triton.jit
def _attend(
    queries, keys, values, q_rows_scale, k_scale, inside, state_m, state_l, state_acc, scale, INT8: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Take one tile of keys into the online softmax of a tile of queries; powers of two, float32."""
    if INT8:
        logits = tl.dot(queries, tl.trans(keys)).to(tl.float32) * (q_rows_scale * k_scale * scale)
    else:
        logits = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale
    logits = tl.where(inside[None, :], logits, float("-inf"))
    top = tl.maximum(state_m, tl.max(logits, 1))
    # Where nothing has been seen yet, -inf - -inf would be NaN.
    safe = tl.where(top == float("-inf"), 0.0, top)
    weights = tl.exp2(logits - safe[:, None])
    shrink = tl.exp2(state_m - safe)
    total = state_l * shrink + tl.sum(weights, 1)
    acc = state_acc * shrink[:, None] + tl.dot(weights.to(values.dtype), values, input_precision=PRECISION)
    return top, total, acc


@triton.jit
def forward(
    q, k, v, out,
    q_scales, k_scales,
    order, rows, counts, lists,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token, out_batch, out_head, out_token,
    n, text, k_first, k_text, v_first, v_text,
    heads, shared_k, shared_v, tiles, row_count, list_length, q_scale_count, k_scale_count, scale,
    WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, PADDED: tl.constexpr, PADDED_V: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, TILE_Q: tl.constexpr, TILE_K: tl.constexpr,
    REORDERED: tl.constexpr, INT8: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute one tile of image queries of one head.

    Args:
        q, k, v, out: Tensors [B, H, tokens, width] by their strides, the last is 1; q and out of the image alone.
        q_scales, k_scales: Float32 [B, H, tiles of queries] and [B, H, tiles of keys], if INT8.
        order: Int32 [H, n]: where token i of a head's order lies among the image's.
        rows: Int32 [H, query blocks]: blocks in the order in which they are computed, the longest lists first.
        counts, lists: Int32 [H, query blocks] and [H, query blocks, list_length]: key blocks of every query block.
        n, text: Number of image and text tokens.
        k_first, v_first: First image token in k and v.
        k_text, v_text: First text token in k and v.
        heads: Number of heads.
        shared_k, shared_v: Number of heads that share one of k and of v.
        tiles: Tiles in a query block.
        scale: Factor on the logits, log2(e) included.
    """
    place = tl.program_id(0)
    batch = tl.program_id(1) // heads
    head = tl.program_id(1) % heads
    row = tl.load(rows + head * row_count + place // tiles)
    begin = row * BLOCK_Q + place % tiles * TILE_Q
    # Addresses beyond 2^31 elements are real for long videos.
    q += batch.to(tl.int64) * q_batch + head.to(tl.int64) * q_head
    out += batch.to(tl.int64) * out_batch + head.to(tl.int64) * out_head
    k += batch.to(tl.int64) * k_batch + (head // shared_k).to(tl.int64) * k_head
    v += batch.to(tl.int64) * v_batch + (head // shared_v).to(tl.int64) * v_head
    channel = tl.arange(0, PADDED)
    channel_v = tl.arange(0, PADDED_V)
    token = begin + tl.arange(0, TILE_Q)
    real = token < n
    found = tl.load(order + head * n + token, mask=real, other=0) if REORDERED else token
    # Quantised queries and keys are laid out already; values and results never are.
    source = token if INT8 else found
    queries = tl.load(
        q + source.to(tl.int64)[:, None] * q_token + channel[None, :],
        mask=real[:, None] & (channel < WIDTH)[None, :], other=0,
    )  # fmt: skip
    scale_q = 1.0
    if INT8:
        scale_q = tl.load(
            q_scales + (batch * heads + head) * q_scale_count + begin // TILE_Q, mask=begin < n, other=0.0
        )
    top = tl.full([TILE_Q], float("-inf"), tl.float32)
    total = tl.zeros([TILE_Q], tl.float32)
    acc = tl.zeros([TILE_Q, PADDED_V], tl.float32)
    steps: tl.constexpr = BLOCK_K // TILE_K
    image_tiles = tl.cdiv(n, TILE_K)
    count = tl.load(counts + head * row_count + row)
    listed = lists + (head * row_count + row).to(tl.int64) * list_length
    for i in range(count * steps):
        block = tl.load(listed + i // steps)
        first = block * BLOCK_K + i % steps * TILE_K
        column = first + tl.arange(0, TILE_K)
        inside = column < n
        spot = tl.load(order + head * n + column, mask=inside, other=0) if REORDERED else column
        spot_k = column if INT8 else spot
        keys = tl.load(
            k + (k_first + spot_k).to(tl.int64)[:, None] * k_token + channel[None, :],
            mask=inside[:, None] & (channel < WIDTH)[None, :], other=0,
        )  # fmt: skip
        values = tl.load(
            v + (v_first + spot).to(tl.int64)[:, None] * v_token + channel_v[None, :],
            mask=inside[:, None] & (channel_v < WIDTH_V)[None, :], other=0.0,
        )  # fmt: skip
        scale_k = 1.0
        if INT8:
            scale_k = tl.load(
                k_scales + (batch * heads + head) * k_scale_count + first // TILE_K, mask=first < n, other=0.0
            )
        top, total, acc = _attend(
            queries, keys, values, scale_q, scale_k, inside, top, total, acc, scale, INT8, PRECISION
        )
    for i in range(tl.cdiv(text, TILE_K)):
        column = i * TILE_K + tl.arange(0, TILE_K)
        inside = column < text
        keys = tl.load(
            k + (k_text + column).to(tl.int64)[:, None] * k_token + channel[None, :],
            mask=inside[:, None] & (channel < WIDTH)[None, :], other=0,
        )  # fmt: skip
        values = tl.load(
            v + (v_text + column).to(tl.int64)[:, None] * v_token + channel_v[None, :],
            mask=inside[:, None] & (channel_v < WIDTH_V)[None, :], other=0.0,
        )  # fmt: skip
        scale_k = 1.0
        if INT8:
            scale_k = tl.load(k_scales + (batch * heads + head) * k_scale_count + image_tiles + i)
        top, total, acc = _attend(
            queries, keys, values, scale_q, scale_k, inside, top, total, acc, scale, INT8, PRECISION
        )
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(
        out + found.to(tl.int64)[:, None] * out_token + channel_v[None, :], acc.to(out.dtype.element_ty),
        mask=real[:, None] & (channel_v < WIDTH_V)[None, :],
    )  # fmt: skip
