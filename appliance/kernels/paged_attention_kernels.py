"""The Triton kernels of `kernels/paged_attention.py`, which launches them and says where the algorithms come from.

Sizes in capitals are tile sizes and switches chosen at launch; strides are in elements. Softmax runs in base 2 with a
finite initial maximum (-1e30), so that fully masked rows and empty ranges stay free of NaN; accumulation is float32.
K and V of an FP8 cache are widened to q's dtype, which holds each of its numbers exactly; `scale` includes the scale of
K, `out_scale` is that of V (kernels/attention.py).
"""

from __future__ import annotations

from appliance.kernels._triton import tl, triton


@triton.jit
def _kv_loop(
    q,
    acc,
    row_max,
    row_sum,
    kv_ptr,
    table_ptr,
    position,
    begin,
    end,
    window,
    page_stride,
    kv_stride,
    token_stride,
    scale,
    page_size: tl.constexpr,
    head_dim: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
    WINDOWED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Online softmax of q [M, DIM] over cache positions [begin, end), in blocks of BLOCK_N.

    Not MASKED: end - begin is a multiple of BLOCK_N and every row sees all of it. MASKED: the row at `position` [M]
    sees up to itself, and with WINDOWED only the last `window` of those. `scale` includes log2(e).
    """
    lane = tl.arange(0, DIM)
    for start in range(begin, end, BLOCK_N):
        pos = start + tl.arange(0, BLOCK_N)
        if MASKED:
            page = tl.load(table_ptr + pos // page_size, mask=pos < end, other=0)
        else:
            page = tl.load(table_ptr + pos // page_size)
        place = page.to(tl.int64) * page_stride + (pos % page_size) * token_stride
        key = kv_ptr + place[None, :] + lane[:, None]
        value = kv_ptr + kv_stride + place[:, None] + lane[None, :]
        if MASKED or head_dim != DIM:
            k = tl.load(key, mask=(pos < end)[None, :] & (lane < head_dim)[:, None], other=0.0)
            v = tl.load(value, mask=(pos < end)[:, None] & (lane < head_dim)[None, :], other=0.0)
        else:
            k = tl.load(key)
            v = tl.load(value)
        scores = tl.dot(q, k.to(q.dtype), input_precision=PRECISION) * scale
        if MASKED:
            seen = (pos[None, :] <= position[:, None]) & (pos < end)[None, :]
            if WINDOWED:
                seen = seen & (pos[None, :] > position[:, None] - window)
            scores = tl.where(seen, scores, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(scores, 1))  # finite: row_max starts finite
        p = tl.exp2(scores - new_max[:, None])
        decay = tl.exp2(row_max - new_max)
        row_sum = row_sum * decay + tl.sum(p, 1)
        acc = acc * decay[:, None]
        acc = tl.dot(p.to(q.dtype), v.to(q.dtype), acc, input_precision=PRECISION)
        row_max = new_max
    return acc, row_max, row_sum


@triton.jit
def _split_range(length, window, WINDOWED: tl.constexpr, SPLITS: tl.constexpr, BLOCK_N: tl.constexpr):
    """(first visible position, tokens a split takes, number of splits in use) of a decode row."""
    begin = length * 0
    if WINDOWED:
        begin = tl.maximum(length - window, 0)
    span = length - begin
    used = tl.minimum(tl.maximum(tl.cdiv(span, 2 * BLOCK_N), 1), SPLITS)
    chunk = tl.cdiv(tl.cdiv(span, used), BLOCK_N) * BLOCK_N
    return begin, chunk, used


@triton.jit
def decode_kernel(
    q_ptr,
    cache_ptr,
    out_ptr,
    partial_ptr,
    stats_ptr,
    seq_lens_ptr,
    table_ptr,
    window,
    scale,
    out_scale,
    table_stride,
    q_token_stride,
    q_head_stride,
    out_token_stride,
    out_head_stride,
    page_stride,
    kv_stride,
    token_stride,
    head_stride,
    num_heads: tl.constexpr,
    group: tl.constexpr,
    page_size: tl.constexpr,
    head_dim: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr,
    WINDOWED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Program (sequence, K/V head, split). A row of one split writes its output, any other partials for the merge."""
    seq = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    length = tl.load(seq_lens_ptr + seq)
    first, chunk, used = _split_range(length, window, WINDOWED, SPLITS, BLOCK_N)
    if split >= used:
        return
    begin = first + split * chunk
    end = tl.minimum(begin + chunk, length)
    full_end = begin + tl.maximum(end - begin, 0) // BLOCK_N * BLOCK_N

    row = tl.arange(0, BLOCK_H)
    lane = tl.arange(0, DIM)
    head = kv_head * group + row
    valid = (row < group)[:, None] & (lane < head_dim)[None, :]
    q_place = seq * q_token_stride + head[:, None] * q_head_stride + lane[None, :]
    q = tl.load(q_ptr + q_place, mask=valid, other=0.0)
    acc = tl.zeros([BLOCK_H, DIM], tl.float32)
    row_max = tl.full([BLOCK_H], -1.0e30, tl.float32)
    row_sum = tl.zeros([BLOCK_H], tl.float32)
    position = tl.zeros([BLOCK_H], tl.int32) + end - 1
    kv_ptr = cache_ptr + kv_head * head_stride
    table_row = table_ptr + seq * table_stride
    acc, row_max, row_sum = _kv_loop(
        q, acc, row_max, row_sum, kv_ptr, table_row, position, begin, full_end, window, page_stride, kv_stride,
        token_stride, scale, page_size, head_dim, DIM, BLOCK_N, False, False, PRECISION,
    )  # fmt: skip
    acc, row_max, row_sum = _kv_loop(
        q, acc, row_max, row_sum, kv_ptr, table_row, position, full_end, end, window, page_stride, kv_stride,
        token_stride, scale, page_size, head_dim, DIM, BLOCK_N, True, False, PRECISION,
    )  # fmt: skip
    if used == 1:
        out = acc * (out_scale / tl.where(row_sum > 0, row_sum, 1.0))[:, None]
        out_place = seq * out_token_stride + head[:, None] * out_head_stride + lane[None, :]
        tl.store(out_ptr + out_place, out.to(out_ptr.dtype.element_ty), mask=valid)
    else:
        slot = (seq * num_heads + head) * SPLITS + split
        tl.store(partial_ptr + slot[:, None] * head_dim + lane[None, :], acc, mask=valid)
        tl.store(stats_ptr + slot * 2, row_max, mask=row < group)
        tl.store(stats_ptr + slot * 2 + 1, row_sum, mask=row < group)


@triton.jit
def merge_kernel(
    partial_ptr,
    stats_ptr,
    out_ptr,
    seq_lens_ptr,
    window,
    out_scale,
    out_token_stride,
    out_head_stride,
    num_heads: tl.constexpr,
    head_dim: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SPLITS: tl.constexpr,
    WINDOWED: tl.constexpr,
):
    """Program (sequence, head): combines the splits in use; rows with one split are done already."""
    seq = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    _, _, used = _split_range(tl.load(seq_lens_ptr + seq), window, WINDOWED, SPLITS, BLOCK_N)
    if used == 1:
        return
    split = tl.arange(0, SPLITS)
    lane = tl.arange(0, DIM)
    live = split < used
    slot = (seq * num_heads + head) * SPLITS + split
    row_max = tl.load(stats_ptr + slot * 2, mask=live, other=-1.0e30)
    row_sum = tl.load(stats_ptr + slot * 2 + 1, mask=live, other=0.0)
    valid = live[:, None] & (lane < head_dim)[None, :]
    acc = tl.load(partial_ptr + slot[:, None] * head_dim + lane[None, :], mask=valid, other=0.0)
    weight = tl.exp2(row_max - tl.max(row_max, 0))
    out = tl.sum(acc * weight[:, None], 0) * (out_scale / tl.sum(row_sum * weight, 0))
    place = out_ptr + seq * out_token_stride + head * out_head_stride + lane
    tl.store(place, out.to(out_ptr.dtype.element_ty), mask=lane < head_dim)


@triton.jit
def prefill_kernel(
    q_ptr,
    cache_ptr,
    out_ptr,
    tiles_ptr,
    query_start_ptr,
    seq_lens_ptr,
    table_ptr,
    window,
    scale,
    out_scale,
    num_tiles,
    table_stride,
    q_token_stride,
    q_head_stride,
    out_token_stride,
    out_head_stride,
    page_stride,
    kv_stride,
    token_stride,
    head_stride,
    num_kv_heads: tl.constexpr,
    group: tl.constexpr,
    page_size: tl.constexpr,
    head_dim: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WINDOWED: tl.constexpr,
    INVARIANT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Program (tile, K/V head): BLOCK_M // group consecutive query tokens of a sequence, all heads of the group."""
    tile = tl.program_id(0) // num_kv_heads
    kv_head = tl.program_id(0) % num_kv_heads
    seq = tl.load(tiles_ptr + tile).to(tl.int64)
    first = tl.load(tiles_ptr + num_tiles + tile)  # of the tile's tokens, counted in the sequence's new tokens
    query_begin = tl.load(query_start_ptr + seq)
    query_len = tl.load(query_start_ptr + seq + 1) - query_begin
    length = tl.load(seq_lens_ptr + seq)
    tokens = tl.minimum(query_len - first, BLOCK_M // group)
    first_position = length - query_len + first
    end = first_position + tokens

    row = tl.arange(0, BLOCK_M)
    lane = tl.arange(0, DIM)
    token = row // group
    head = kv_head * group + row % group
    valid = (token < tokens)[:, None] & (lane < head_dim)[None, :]
    q_row = (query_begin + first + token).to(tl.int64)
    q_place = q_row[:, None] * q_token_stride + head[:, None] * q_head_stride + lane[None, :]
    q = tl.load(q_ptr + q_place, mask=valid, other=0.0)
    acc = tl.zeros([BLOCK_M, DIM], tl.float32)
    row_max = tl.full([BLOCK_M], -1.0e30, tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    position = first_position + token
    kv_ptr = cache_ptr + kv_head * head_stride
    table_row = table_ptr + seq * table_stride

    # Blocks that every row sees whole need no mask: [full_begin, full_end). Before them the window's edge, after them
    # the causal one.
    begin = first_position * 0
    if WINDOWED:
        begin = tl.maximum(first_position - window + 1, 0) // BLOCK_N * BLOCK_N
    if INVARIANT:  # which blocks need no mask depends on the tile, and compilers fuse the loops differently
        acc, row_max, row_sum = _kv_loop(
            q, acc, row_max, row_sum, kv_ptr, table_row, position, begin, end, window, page_stride, kv_stride,
            token_stride, scale, page_size, head_dim, DIM, BLOCK_N, True, WINDOWED, PRECISION,
        )  # fmt: skip
    else:
        full_begin = begin
        full_end = (first_position + 1) // BLOCK_N * BLOCK_N
        if WINDOWED:
            full_begin = tl.maximum(tl.cdiv(tl.maximum(end - window, 0), BLOCK_N) * BLOCK_N, begin)
            full_begin = tl.minimum(full_begin, tl.cdiv(end, BLOCK_N) * BLOCK_N)
            full_end = tl.maximum(full_end, full_begin)
            acc, row_max, row_sum = _kv_loop(
                q, acc, row_max, row_sum, kv_ptr, table_row, position, begin, tl.minimum(full_begin, end), window,
                page_stride, kv_stride, token_stride, scale, page_size, head_dim, DIM, BLOCK_N, True, True, PRECISION,
            )  # fmt: skip
        acc, row_max, row_sum = _kv_loop(
            q, acc, row_max, row_sum, kv_ptr, table_row, position, full_begin, full_end, window, page_stride,
            kv_stride, token_stride, scale, page_size, head_dim, DIM, BLOCK_N, False, WINDOWED, PRECISION,
        )  # fmt: skip
        acc, row_max, row_sum = _kv_loop(
            q, acc, row_max, row_sum, kv_ptr, table_row, position, full_end, end, window, page_stride, kv_stride,
            token_stride, scale, page_size, head_dim, DIM, BLOCK_N, True, WINDOWED, PRECISION,
        )  # fmt: skip
    out = acc * (out_scale / tl.where(row_sum > 0, row_sum, 1.0))[:, None]
    out_place = q_row[:, None] * out_token_stride + head[:, None] * out_head_stride + lane[None, :]
    tl.store(out_ptr + out_place, out.to(out_ptr.dtype.element_ty), mask=valid)
