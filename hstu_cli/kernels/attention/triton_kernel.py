"""The Triton kernels of HSTU attention, for whole sequences and for new tokens over pages.

A program takes BLOCK_M query rows of one head and walks over blocks of BLOCK_N keys, as far as the mask lets any of its
rows see. What it needs to know of the batch it reads on the device.
"""

import triton
import triton.language as tl

# Shapes: T tokens, B sequences, H heads, d head_dim, M = BLOCK_M rows, N = BLOCK_N keys, S splits of the keys.


@triton.jit
def _silu(scores, half_alpha, APPROXIMATE: tl.constexpr):
    """SiLU(alpha * scores) in float32, of which half_alpha = alpha / 2.

    SiLU(x) = y + y tanh(y) with y = x / 2 takes one instruction of the special function unit instead of two; its
    tanh has an error of 2^-11, which bf16 and fp16 weights would not show.
    """
    y = scores * half_alpha
    if APPROXIMATE:
        tanh = tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [y], dtype=tl.float32, is_pure=True, pack=1)
        return y * tanh + y
    x = 2 * y
    return x / (1 + tl.exp(-x))


@triton.jit
def _load_rows(rows, seen, column, HEAD_DIM: tl.constexpr, COLUMNS: tl.constexpr):
    """A tile [R, COLUMNS]: `rows` [R, 1] points at column 0; zeros where `seen` [R, 1] is false (None: nowhere)."""
    if HEAD_DIM % COLUMNS == 0:  # no tile has columns beyond the head
        if seen is None:
            tile = tl.load(rows + column[None, :])
        else:
            tile = tl.load(rows + column[None, :], mask=seen, other=0.0)
    else:
        in_head = (column < HEAD_DIM)[None, :]
        if seen is None:
            tile = tl.load(rows + column[None, :], mask=in_head, other=0.0)
        else:
            tile = tl.load(rows + column[None, :], mask=seen & in_head, other=0.0)
    return tile


@triton.jit
def _scores(
    q,
    q_rows,
    in_rows,
    k_rows,
    seen,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Products of rows and keys [M, N]; a key that is not seen counts as zeros.

    BLOCK_D: channels at a time. Less than all is for float32, which is multiplied in registers and overflows them;
    the rows are then read again.
    """
    if BLOCK_D >= PADDED_DIM:
        k = _load_rows(k_rows, seen, tl.arange(0, PADDED_DIM), HEAD_DIM, PADDED_DIM)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
    else:
        scores = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for first in range(0, HEAD_DIM, BLOCK_D):
            column = first + tl.arange(0, BLOCK_D)
            q_part = _load_rows(q_rows, in_rows, column, HEAD_DIM, BLOCK_D)
            k_part = _load_rows(k_rows, seen, column, HEAD_DIM, BLOCK_D)
            scores = tl.dot(q_part, tl.trans(k_part), scores, input_precision="ieee")
    return scores


@triton.jit(do_not_specialize=["num_sequences", "num_tokens", "num_splits"])
def hstu_attention_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,  # [T, H, d], or partial sums [S, T, H, d] float32
    seq_offsets_ptr,
    num_candidates_ptr,
    pages_ptr,  # [num_pages, 2, PAGE_SIZE, H, d]
    page_indptr_ptr,
    page_ids_ptr,
    cached_lengths_ptr,
    num_sequences,
    num_tokens,
    num_splits,
    half_alpha,
    scale,  # of the output
    q_token,  # strides
    q_head,
    k_token,
    k_head,
    v_token,
    v_head,
    page_page,
    page_value,
    page_token,
    page_head,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr,
    PAGE_SIZE: tl.constexpr,  # 0 for no pages
    SPLIT: tl.constexpr,
    BATCH_BLOCK: tl.constexpr,
    APPROXIMATE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One tile of BLOCK_M rows of one head over one split of its keys; see `hstu_attention` for the tensors."""
    pid = tl.program_id(0)
    split = pid % num_splits
    head = (pid // num_splits % NUM_HEADS).to(tl.int64)
    tile = pid // (num_splits * NUM_HEADS)

    # Tiles are numbered so that those of sequence b begin at seq_offsets[b] // M + b: enough for any alignment, and it
    # takes one comparison for each sequence to find the own one. Some numbers are left over.
    sequence = -1
    for first_sequence in range(0, num_sequences, BATCH_BLOCK):
        b = first_sequence + tl.arange(0, BATCH_BLOCK)
        starts = tl.load(seq_offsets_ptr + b, mask=b < num_sequences, other=0)
        sequence += tl.sum(((b < num_sequences) & (starts // BLOCK_M + b <= tile)).to(tl.int32), 0)
    start = tl.load(seq_offsets_ptr + sequence)
    length = tl.load(seq_offsets_ptr + sequence + 1) - start
    tile -= start // BLOCK_M + sequence
    num_tiles = tl.cdiv(length, BLOCK_M)
    if tile >= num_tiles:
        return
    first = (num_tiles - 1 - tile) * BLOCK_M  # rows with the most keys go first, so that the last programs are short
    num_history = length - tl.load(num_candidates_ptr + sequence)

    m = tl.arange(0, BLOCK_M)[:, None]
    n = tl.arange(0, BLOCK_N)[:, None]
    column = tl.arange(0, PADDED_DIM)
    row = first + m  # [M, 1]
    in_rows = row < length
    start = start.to(tl.int64)
    q_rows = q_ptr + (start + row) * q_token + head * q_head
    q = _load_rows(q_rows, in_rows, column, HEAD_DIM, PADDED_DIM)
    acc = tl.zeros((BLOCK_M, PADDED_DIM), tl.float32)

    # Candidates see themselves, besides history: first, while registers are free.
    if (first + BLOCK_M > num_history) & (split == 0):
        own = in_rows & (row >= num_history)
        k = _load_rows(k_ptr + (start + row) * k_token + head * k_head, own, column, HEAD_DIM, PADDED_DIM)
        v = _load_rows(v_ptr + (start + row) * v_token + head * v_head, own, column, HEAD_DIM, PADDED_DIM)
        scores = tl.sum(q.to(tl.float32) * k.to(tl.float32), 1)  # [M]
        acc += _silu(scores, half_alpha, APPROXIMATE)[:, None] * v.to(tl.float32)

    # Blocks of keys: those of the pages, then those of new history. This split takes `begin` to `end` of them.
    num_cached = 0
    if PAGE_SIZE > 0:
        num_cached = tl.load(cached_lengths_ptr + sequence)
    cached_blocks = tl.cdiv(num_cached, BLOCK_N)
    num_seen = tl.minimum(first + BLOCK_M, num_history)  # new history that any of the rows sees
    num_blocks = cached_blocks + tl.cdiv(num_seen, BLOCK_N)
    begin, end = 0, num_blocks
    if SPLIT:
        each = tl.cdiv(num_blocks, num_splits)
        begin = tl.minimum(split * each, num_blocks)
        end = tl.minimum(begin + each, num_blocks)

    if PAGE_SIZE > 0:
        page_ids = page_ids_ptr + tl.load(page_indptr_ptr + sequence)
        for block in range(begin, tl.minimum(end, cached_blocks)):
            key = block * BLOCK_N + n
            seen = key < num_cached
            if PAGE_SIZE % BLOCK_N == 0:
                page = tl.load(page_ids + block * BLOCK_N // PAGE_SIZE).to(tl.int64)
            else:
                page = tl.load(page_ids + key // PAGE_SIZE, mask=seen, other=0).to(tl.int64)
            keys = pages_ptr + head * page_head + page * page_page + key % PAGE_SIZE * page_token
            scores = _scores(q, q_rows, in_rows, keys, seen, HEAD_DIM, PADDED_DIM, BLOCK_M, BLOCK_N, BLOCK_D)
            v = _load_rows(keys + page_value, seen, column, HEAD_DIM, PADDED_DIM)
            # A key that is not seen is zero here, and so is its weight, SiLU(0).
            weights = _silu(scores, half_alpha, APPROXIMATE).to(v.dtype)
            acc = tl.dot(weights, v, acc, input_precision="ieee")

    begin = tl.maximum(begin - cached_blocks, 0)
    end = tl.maximum(end - cached_blocks, 0)
    full_blocks = tl.minimum(first + 1, num_history) // BLOCK_N  # that all of the rows see whole
    k_rows = k_ptr + (start + n) * k_token + head * k_head
    v_rows = v_ptr + (start + n) * v_token + head * v_head
    for block in range(begin, tl.minimum(end, full_blocks)):
        offset = tl.cast(block, tl.int64) * BLOCK_N
        scores = _scores(
            q, q_rows, in_rows, k_rows + offset * k_token, None, HEAD_DIM, PADDED_DIM, BLOCK_M, BLOCK_N, BLOCK_D
        )
        v = _load_rows(v_rows + offset * v_token, None, column, HEAD_DIM, PADDED_DIM)
        acc = tl.dot(_silu(scores, half_alpha, APPROXIMATE).to(v.dtype), v, acc, input_precision="ieee")
    limit = tl.minimum(row + 1, num_history)  # [M, 1], the new history that a row sees
    for block in range(tl.maximum(begin, full_blocks), end):
        offset = tl.cast(block, tl.int64) * BLOCK_N
        key = block * BLOCK_N + n
        seen = key < num_seen
        scores = _scores(
            q, q_rows, in_rows, k_rows + offset * k_token, seen, HEAD_DIM, PADDED_DIM, BLOCK_M, BLOCK_N, BLOCK_D
        )
        v = _load_rows(v_rows + offset * v_token, seen, column, HEAD_DIM, PADDED_DIM)
        weights = _silu(tl.where(tl.trans(key) < limit, scores, 0.0), half_alpha, APPROXIMATE).to(v.dtype)
        acc = tl.dot(weights, v, acc, input_precision="ieee")

    out_row = start + row
    if SPLIT:
        out_row += split.to(tl.int64) * num_tokens
    else:
        acc *= scale
    out_rows = out_ptr + (out_row * NUM_HEADS + head) * HEAD_DIM
    in_out = in_rows & (column < HEAD_DIM)[None, :]
    tl.store(out_rows + column[None, :], acc.to(out_ptr.dtype.element_ty), mask=in_out)


@triton.jit(do_not_specialize=["num_splits"])
def hstu_attention_sum_kernel(
    partial_ptr,  # [S, num_elements] float32
    out_ptr,  # [num_elements]
    num_elements,
    num_splits,
    scale,
    BLOCK: tl.constexpr,
):
    """Out = scale * the sum of the splits, in their order: the same bits in every run."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < num_elements
    total = tl.zeros((BLOCK,), tl.float32)
    partial = partial_ptr + at
    for _ in range(num_splits):
        total += tl.load(partial, mask=inside, other=0.0)
        partial += num_elements
    tl.store(out_ptr + at, (total * scale).to(out_ptr.dtype.element_ty), mask=inside)
