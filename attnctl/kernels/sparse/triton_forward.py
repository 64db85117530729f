"""The Triton program of block-sparse attention: one tile of queries, the key blocks of its list, an online softmax.

Imported only where Triton is there. Rows are found through each head's order while they are loaded, so nothing is laid
out beforehand; the text's keys come last, and every query sees them. Distances between tokens are constants of the
program, and those between heads and samples come in units of `ALIGN` elements, so that heads of any width are loaded
16 bytes at a time. The subset of the language is that which Triton's interpreter runs on a CPU.
"""

# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["forward"]


@triton.jit
def _rows(x, token, valid, STRIDE: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, MASKED: tl.constexpr):
    """Load rows of one head; channels beyond the width, and tokens that are not valid, are zero."""
    channel = tl.arange(0, PADDED)
    # Addresses beyond 2^31 elements are real for long videos.
    places = x + token.to(tl.int64)[:, None] * STRIDE + channel[None, :]
    if MASKED:
        return tl.load(places, mask=valid[:, None] & (channel < WIDTH)[None, :], other=0)
    if PADDED != WIDTH:
        return tl.load(places, mask=(channel < WIDTH)[None, :], other=0)
    return tl.load(places)


@triton.jit
def _store(x, token, valid, rows, STRIDE: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """Write rows of one head."""
    channel = tl.arange(0, PADDED)
    places = x + token.to(tl.int64)[:, None] * STRIDE + channel[None, :]
    tl.store(places, rows.to(x.dtype.element_ty), mask=valid[:, None] & (channel < WIDTH)[None, :])


@triton.jit
def _store_sums(sums, token, valid, powers):
    """Write the logs of sums of exponentials, which come as powers of two."""
    tl.store(sums + token, powers * 0.6931471805599453, mask=valid)


@triton.jit
def _attend(
    queries, q_scale, k, v, k_scale, at_k, at_v, inside, top, total, acc, rest, scale,
    K_TOKEN: tl.constexpr, V_TOKEN: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, PADDED: tl.constexpr,
    PADDED_V: tl.constexpr, MASKED: tl.constexpr, SPLIT: tl.constexpr, INT8: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Take one tile of keys into the online softmax of a tile of queries; powers of two, float32."""
    keys = _rows(k, at_k, inside, K_TOKEN, WIDTH, PADDED, MASKED)
    values = _rows(v, at_v, inside, V_TOKEN, WIDTH_V, PADDED_V, MASKED)
    if INT8:
        logits = tl.dot(queries, tl.trans(keys)).to(tl.float32) * (q_scale * k_scale)
    else:
        logits = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)
    if MASKED:
        logits = tl.where(inside[None, :], logits, float("-inf"))
    # Every tile has a key that is inside, so the largest logit is finite.
    above = tl.maximum(top, tl.max(logits, 1))
    weights = tl.exp2(logits * scale - (above * scale)[:, None])
    shrink = tl.exp2((top - above) * scale)
    total = total * shrink + tl.sum(weights, 1)
    low = weights.to(values.dtype)
    acc = tl.dot(low, values, acc * shrink[:, None], input_precision=PRECISION)
    if SPLIT:
        values = _rows(v + PADDED_V, at_v, inside, V_TOKEN, WIDTH_V - PADDED_V, PADDED_V, MASKED)
        rest = tl.dot(low, values, rest * shrink[:, None], input_precision=PRECISION)
    return above, total, acc, rest


@triton.jit
def _listed(
    queries, q_scale, k, v, k_scales, order, listed, begin, end, n, k_first, v_first, top, total, acc, rest, scale,
    BLOCK_K: tl.constexpr, TILE_K: tl.constexpr, K_TOKEN: tl.constexpr, V_TOKEN: tl.constexpr, WIDTH: tl.constexpr,
    WIDTH_V: tl.constexpr, PADDED: tl.constexpr, PADDED_V: tl.constexpr, REORDERED: tl.constexpr,
    MASKED: tl.constexpr, SPLIT: tl.constexpr, INT8: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attend to the image tiles `begin` to `end` of a list of key blocks; tokens beyond n are left out if MASKED."""
    steps: tl.constexpr = BLOCK_K // TILE_K
    for i in range(begin, end):
        first = tl.load(listed + i // steps) * BLOCK_K + i % steps * TILE_K
        column = first + tl.arange(0, TILE_K)
        inside = column < n
        spot = column
        if REORDERED:
            spot = tl.load(order + column, mask=inside, other=0) if MASKED else tl.load(order + column)
        # Quantised keys are laid out in the head's order already; values never are.
        at_k = k_first + (column if INT8 else spot)
        k_scale = tl.load(k_scales + first // TILE_K) if INT8 else 1.0
        top, total, acc, rest = _attend(
            queries, q_scale, k, v, k_scale, at_k, v_first + spot, inside, top, total, acc, rest, scale,
            K_TOKEN, V_TOKEN, WIDTH, WIDTH_V, PADDED, PADDED_V, MASKED, SPLIT, INT8, PRECISION,
        )  # fmt: skip
    return top, total, acc, rest


@triton.jit
def _text(
    queries, q_scale, k, v, k_scales, words, begin, end, text, k_text, v_text, top, total, acc, rest, scale,
    TILE_K: tl.constexpr, K_TOKEN: tl.constexpr, V_TOKEN: tl.constexpr, WIDTH: tl.constexpr,
    WIDTH_V: tl.constexpr, PADDED: tl.constexpr, PADDED_V: tl.constexpr, MASKED: tl.constexpr,
    SPLIT: tl.constexpr, WORDS: tl.constexpr, INT8: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attend to the text tiles `begin` to `end`; tokens beyond the text, or no words, are left out if MASKED."""
    for i in range(begin, end):
        column = i * TILE_K + tl.arange(0, TILE_K)
        inside = column < text
        if WORDS:
            inside = inside & (tl.load(words + column, mask=inside, other=0) != 0)
        k_scale = tl.load(k_scales + i) if INT8 else 1.0
        top, total, acc, rest = _attend(
            queries, q_scale, k, v, k_scale, k_text + column, v_text + column, inside,
            top, total, acc, rest, scale,
            K_TOKEN, V_TOKEN, WIDTH, WIDTH_V, PADDED, PADDED_V, MASKED, SPLIT, INT8, PRECISION,
        )  # fmt: skip
    return top, total, acc, rest


@triton.jit
def forward(
    q, k, v, out, sums,
    q_scales, k_scales,
    ids, order, rows, counts, lists, words,
    q_batch, q_head, k_batch, k_head, v_batch, v_head, out_batch, out_head,
    n, text, k_first, k_text, v_first, v_text,
    heads, shared_k, shared_v, tiles, row_count, list_length, q_scale_count, k_scale_count, scale,
    Q_TOKEN: tl.constexpr, K_TOKEN: tl.constexpr, V_TOKEN: tl.constexpr, OUT_TOKEN: tl.constexpr, ALIGN: tl.constexpr,
    WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, PADDED: tl.constexpr, PADDED_V: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, TILE_Q: tl.constexpr, TILE_K: tl.constexpr, SUMS: tl.constexpr,
    REORDERED: tl.constexpr, SPLIT: tl.constexpr, WORDS: tl.constexpr, INT8: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Compute one tile of image queries of one head.

    Args:
        q, k, v, out: Tensors [B, H, tokens, width]: strides of batch and head in units of ALIGN elements, of tokens in
            elements, the last is 1; q and out of the image alone.
        sums: Float32 [B, H, n], the log of every query's sum of exponentials, if SUMS.
        q_scales, k_scales: Float32 [B, H, tiles of queries] and [B, H, tiles of keys], if INT8.
        ids, order: Int32 [H] and [orders, n]: every head's order, and where token i of an order lies among the image's.
        rows: Int32 [H, query blocks]: blocks in the order in which they are computed, the longest lists first.
        counts, lists: Int32 [H, query blocks] and [H, query blocks, list_length]: the key blocks of every query block,
            in ascending order.
        words: Int8 [B, text]: which text keys are attended to, if WORDS.
        n, text: Number of image and text tokens.
        k_first, v_first: First image token in k and v.
        k_text, v_text: First text token in k and v.
        heads: Number of heads.
        shared_k, shared_v: Number of heads that share one of k and of v.
        tiles: Tiles in a query block.
        SPLIT: Whether values and their sums are two halves of PADDED_V channels each, see `kernels.sparse.triton.run`.
        scale: Positive factor on the logits, log2(e) included.
    """
    place = tl.program_id(0)
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = (tl.program_id(1) % heads).to(tl.int64)
    row = tl.load(rows + head * row_count + place // tiles)
    begin = row * BLOCK_Q + place % tiles * TILE_Q
    q += (batch * q_batch + head * q_head) * ALIGN
    out += (batch * out_batch + head * out_head) * ALIGN
    k += (batch * k_batch + head // shared_k * k_head) * ALIGN
    v += (batch * v_batch + head // shared_v * v_head) * ALIGN
    if REORDERED:
        order += tl.load(ids + head).to(tl.int64) * n
    k_scales += (batch * heads + head) * k_scale_count
    token = begin + tl.arange(0, TILE_Q)
    real = token < n
    positions = tl.load(order + token, mask=real, other=0) if REORDERED else token
    # Quantised queries and keys are laid out already; values and results never are.
    queries = _rows(q, token if INT8 else positions, real, Q_TOKEN, WIDTH, PADDED, True)
    q_scale = 1.0
    if INT8:
        q_scale = tl.load(q_scales + (batch * heads + head) * q_scale_count + begin // TILE_Q, mask=begin < n, other=0)
    top = tl.full([TILE_Q], float("-inf"), tl.float32)
    total = tl.zeros([TILE_Q], tl.float32)
    acc = tl.zeros([TILE_Q, PADDED_V], tl.float32)
    rest = acc if SPLIT else 0.0
    count = tl.load(counts + head * row_count + row)
    listed = lists + (head * row_count + row) * list_length
    # Only the image's last tile can be a partial one, and it stands last in a list. Nothing is masked before it.
    last = tl.load(listed + count - 1) * BLOCK_K
    whole = (count - 1) * (BLOCK_K // TILE_K) + tl.minimum(n - last, BLOCK_K) // TILE_K
    end = whole + tl.where(last + BLOCK_K > n, tl.minimum(n % TILE_K, 1), 0)
    for i in tl.static_range(2):
        top, total, acc, rest = _listed(
            queries, q_scale, k, v, k_scales, order, listed, whole * i, tl.where(i == 0, whole, end), n,
            k_first, v_first, top, total, acc, rest, scale, BLOCK_K, TILE_K, K_TOKEN, V_TOKEN,
            WIDTH, WIDTH_V, PADDED, PADDED_V, REORDERED, i == 1, SPLIT, INT8, PRECISION,
        )  # fmt: skip
    k_scales += tl.cdiv(n, TILE_K)
    words += batch * text
    whole, end = text // TILE_K, tl.cdiv(text, TILE_K)
    for i in tl.static_range(2):
        top, total, acc, rest = _text(
            queries, q_scale, k, v, k_scales, words, whole * i, tl.where(i == 0, whole, end), text, k_text, v_text,
            top, total, acc, rest, scale, TILE_K, K_TOKEN, V_TOKEN,
            WIDTH, WIDTH_V, PADDED, PADDED_V, WORDS or i == 1, SPLIT, WORDS, INT8, PRECISION,
        )  # fmt: skip
    if SUMS:
        _store_sums(sums + (batch * heads + head) * n, positions, real, top * scale + tl.log2(total))
    _store(out, positions, real, acc / total[:, None], OUT_TOKEN, WIDTH_V, PADDED_V)
    if SPLIT:
        _store(out + PADDED_V, positions, real, rest / total[:, None], OUT_TOKEN, WIDTH_V - PADDED_V, PADDED_V)
