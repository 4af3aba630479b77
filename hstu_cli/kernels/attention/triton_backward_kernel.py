"""The Triton kernels of HSTU attention's backward pass: scores are computed again, tile by tile, and never stored.

One kernel walks over the keys for the gradient of each tile of queries, another over the queries for those of each tile
of keys and values: every sum is one program's, so that results repeat bit by bit.
"""

import triton
import triton.language as tl

from hstu_cli.kernels.attention.triton_kernel import _load_rows

# Shapes: T tokens, B sequences, H heads, d head_dim, M = BLOCK_M queries, N = BLOCK_N keys.


@triton.jit
def _weights_and_slopes(scores, half_alpha, APPROXIMATE: tl.constexpr):
    """SiLU(alpha * scores), of which half_alpha = alpha / 2, and its slope there.

    With g = sigmoid(x): SiLU(x) = x g, and its slope is g (1 + x (1 - g)). Approximated as the forward pass does.
    """
    y = scores * half_alpha
    x = 2 * y
    if APPROXIMATE:
        tanh = tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [y], dtype=tl.float32, is_pure=True, pack=1)
        gate = 0.5 * tanh + 0.5
    else:
        gate = 1 / (1 + tl.exp(-x))
    return x * gate, gate * (1 + x * (1 - gate))


@triton.jit
def _tile_of_sequence(seq_offsets_ptr, num_sequences, tile, BLOCK: tl.constexpr, BATCH_BLOCK: tl.constexpr):
    """The sequence of a tile, its first row, its length, and the tile's number in it, which may be beyond its end.

    Tiles are numbered as in the forward pass: those of sequence b begin at seq_offsets[b] // BLOCK + b.
    """
    sequence = -1
    for first_sequence in range(0, num_sequences, BATCH_BLOCK):
        b = first_sequence + tl.arange(0, BATCH_BLOCK)
        starts = tl.load(seq_offsets_ptr + b, mask=b < num_sequences, other=0)
        sequence += tl.sum(((b < num_sequences) & (starts // BLOCK + b <= tile)).to(tl.int32), 0)
    start = tl.load(seq_offsets_ptr + sequence)
    length = tl.load(seq_offsets_ptr + sequence + 1) - start
    return sequence, start, length, tile - (start // BLOCK + sequence)


@triton.jit(do_not_specialize=["num_sequences"])
def hstu_attention_query_gradients_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, grad_q_ptr, seq_offsets_ptr, num_candidates_ptr,
    num_sequences, half_alpha, scale,
    q_token, q_head, k_token, k_head, v_token, v_head, grad_token, grad_head, grad_q_token, grad_q_head,
    NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BATCH_BLOCK: tl.constexpr,
    APPROXIMATE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradients of BLOCK_M queries of one head, for grad [T, H, d] of the output; scale: alpha / L."""
    pid = tl.program_id(0)
    head = (pid % NUM_HEADS).to(tl.int64)
    sequence, start, length, tile = _tile_of_sequence(
        seq_offsets_ptr, num_sequences, pid // NUM_HEADS, BLOCK_M, BATCH_BLOCK
    )
    if tile * BLOCK_M >= length:
        return
    first = (tl.cdiv(length, BLOCK_M) - 1 - tile) * BLOCK_M  # the rows with the most keys go first
    num_history = length - tl.load(num_candidates_ptr + sequence)
    start = start.to(tl.int64)
    m = tl.arange(0, BLOCK_M)[:, None]
    n = tl.arange(0, BLOCK_N)[:, None]
    column = tl.arange(0, PADDED_DIM)
    row = first + m  # [M, 1]
    in_rows = row < length
    q = _load_rows(q_ptr + (start + row) * q_token + head * q_head, in_rows, column, HEAD_DIM, PADDED_DIM)
    grad = _load_rows(grad_ptr + (start + row) * grad_token + head * grad_head, in_rows, column, HEAD_DIM, PADDED_DIM)
    acc = tl.zeros((BLOCK_M, PADDED_DIM), tl.float32)

    if first + BLOCK_M > num_history:  # candidates see themselves, besides history
        own = in_rows & (row >= num_history)
        k = _load_rows(k_ptr + (start + row) * k_token + head * k_head, own, column, HEAD_DIM, PADDED_DIM)
        v = _load_rows(v_ptr + (start + row) * v_token + head * v_head, own, column, HEAD_DIM, PADDED_DIM)
        _, slope = _weights_and_slopes(tl.sum(q.to(tl.float32) * k.to(tl.float32), 1), half_alpha, APPROXIMATE)
        grad_weights = tl.sum(grad.to(tl.float32) * v.to(tl.float32), 1)
        acc += (grad_weights * slope)[:, None] * k.to(tl.float32)

    num_seen = tl.minimum(first + BLOCK_M, num_history)  # history that any of the rows sees
    limit = tl.minimum(row + 1, num_history)  # [M, 1], the history that a row sees
    for block in range(0, tl.cdiv(num_seen, BLOCK_N)):
        key = block * BLOCK_N + n  # [N, 1]
        place = start + key
        seen = key < num_seen
        k = _load_rows(k_ptr + place * k_token + head * k_head, seen, column, HEAD_DIM, PADDED_DIM)
        v = _load_rows(v_ptr + place * v_token + head * v_head, seen, column, HEAD_DIM, PADDED_DIM)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")  # [M, N]
        grad_weights = tl.dot(grad, tl.trans(v), input_precision="ieee")
        _, slope = _weights_and_slopes(scores, half_alpha, APPROXIMATE)
        grad_scores = tl.where(tl.trans(key) < limit, grad_weights * slope, 0.0)
        acc = tl.dot(grad_scores.to(k.dtype), k, acc, input_precision="ieee")

    rows = grad_q_ptr + (start + row) * grad_q_token + head * grad_q_head
    in_out = in_rows & (column < HEAD_DIM)[None, :]
    tl.store(rows + column[None, :], (acc * scale).to(grad_q_ptr.dtype.element_ty), mask=in_out)


@triton.jit(do_not_specialize=["num_sequences"])
def hstu_attention_key_gradients_kernel(
    q_ptr, k_ptr, v_ptr, grad_ptr, grad_k_ptr, grad_v_ptr, seq_offsets_ptr, num_candidates_ptr,
    num_sequences, half_alpha, scale, value_scale,
    q_token, q_head, k_token, k_head, v_token, v_head, grad_token, grad_head,
    grad_k_token, grad_k_head, grad_v_token, grad_v_head,
    NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BATCH_BLOCK: tl.constexpr,
    APPROXIMATE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Gradients of BLOCK_N keys and values of one head; scale: alpha / L, value_scale: 1 / L."""
    pid = tl.program_id(0)
    head = (pid % NUM_HEADS).to(tl.int64)
    sequence, start, length, tile = _tile_of_sequence(
        seq_offsets_ptr, num_sequences, pid // NUM_HEADS, BLOCK_N, BATCH_BLOCK
    )
    first = tile * BLOCK_N  # the keys that most rows see go first
    if first >= length:
        return
    num_history = length - tl.load(num_candidates_ptr + sequence)
    start = start.to(tl.int64)
    m = tl.arange(0, BLOCK_M)[:, None]
    n = tl.arange(0, BLOCK_N)[:, None]
    column = tl.arange(0, PADDED_DIM)
    key = first + n  # [N, 1]
    in_keys = key < length
    # Keys that are candidates are zeros here: so are their scores, their weights and the gradients of those.
    history = key < num_history
    k = _load_rows(k_ptr + (start + key) * k_token + head * k_head, history, column, HEAD_DIM, PADDED_DIM)
    v = _load_rows(v_ptr + (start + key) * v_token + head * v_head, history, column, HEAD_DIM, PADDED_DIM)
    acc_k = tl.zeros((BLOCK_N, PADDED_DIM), tl.float32)
    acc_v = tl.zeros((BLOCK_N, PADDED_DIM), tl.float32)

    if first < num_history:
        for begin in range(first, length, BLOCK_M):
            row = begin + m  # [M, 1]
            in_rows = row < length
            q = _load_rows(q_ptr + (start + row) * q_token + head * q_head, in_rows, column, HEAD_DIM, PADDED_DIM)
            grad = _load_rows(
                grad_ptr + (start + row) * grad_token + head * grad_head, in_rows, column, HEAD_DIM, PADDED_DIM
            )
            scores = tl.dot(k, tl.trans(q), input_precision="ieee")  # [N, M]
            grad_weights = tl.dot(v, tl.trans(grad), input_precision="ieee")
            weights, slope = _weights_and_slopes(scores, half_alpha, APPROXIMATE)
            sees = tl.trans(row) >= key  # and every candidate comes after all history
            weights = tl.where(sees, weights, 0.0).to(grad.dtype)
            grad_scores = tl.where(sees, grad_weights * slope, 0.0).to(q.dtype)
            acc_v = tl.dot(weights, grad, acc_v, input_precision="ieee")
            acc_k = tl.dot(grad_scores, q, acc_k, input_precision="ieee")

    if first + BLOCK_N > num_history:  # candidates are seen by themselves alone
        own = in_keys & (key >= num_history)
        q = _load_rows(q_ptr + (start + key) * q_token + head * q_head, own, column, HEAD_DIM, PADDED_DIM)
        k = _load_rows(k_ptr + (start + key) * k_token + head * k_head, own, column, HEAD_DIM, PADDED_DIM)
        v = _load_rows(v_ptr + (start + key) * v_token + head * v_head, own, column, HEAD_DIM, PADDED_DIM)
        grad = _load_rows(grad_ptr + (start + key) * grad_token + head * grad_head, own, column, HEAD_DIM, PADDED_DIM)
        scores = tl.sum(q.to(tl.float32) * k.to(tl.float32), 1)  # [N]
        weights, slope = _weights_and_slopes(scores, half_alpha, APPROXIMATE)
        grad_scores = tl.sum(grad.to(tl.float32) * v.to(tl.float32), 1) * slope
        acc_v += weights[:, None] * grad.to(tl.float32)
        acc_k += grad_scores[:, None] * q.to(tl.float32)

    in_out = in_keys & (column < HEAD_DIM)[None, :]
    k_rows = grad_k_ptr + (start + key) * grad_k_token + head * grad_k_head
    v_rows = grad_v_ptr + (start + key) * grad_v_token + head * grad_v_head
    tl.store(k_rows + column[None, :], (acc_k * scale).to(grad_k_ptr.dtype.element_ty), mask=in_out)
    tl.store(v_rows + column[None, :], (acc_v * value_scale).to(grad_v_ptr.dtype.element_ty), mask=in_out)
