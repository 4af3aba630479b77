"""The Triton kernels of the fused layer's row-wise operators, forward and backward.

Gradients of weights and biases are sums over all rows: each program adds its own rows and stores one partial sum, and
the partial sums are added in a fixed order, so that results repeat bit by bit.
"""

import triton
import triton.language as tl

# Shapes: R rows, W width, P programs.


@triton.jit
def _dropped(seed, row, LEVEL: tl.constexpr, BLOCK: tl.constexpr):
    """Which elements of a row are dropped, [BLOCK], LEVEL of 2^16 of them: by the seed, the row and the column alone.

    A call of the counter-based generator gives four numbers, for four columns side by side.
    """
    counter = tl.arange(0, BLOCK // 4)
    zero = counter * 0
    a, b, c, d = tl.philox(seed, counter, zero + row, zero, zero)
    numbers = tl.reshape(tl.join(tl.join(a, b), tl.join(c, d)), [BLOCK])
    return (numbers & 0xFFFF) < LEVEL


@triton.jit(do_not_specialize=["seed"])
def dropout_mask_kernel(out, seed, WIDTH: tl.constexpr, LEVEL: tl.constexpr, BLOCK: tl.constexpr):
    """Out [R, WIDTH] = 1 where an element is dropped, else 0; one row a program."""
    row = tl.program_id(0)
    column = tl.arange(0, BLOCK)
    dropped = _dropped(seed, row, LEVEL, BLOCK)
    tl.store(out + row.to(tl.int64) * WIDTH + column, dropped.to(tl.int8), mask=column < WIDTH)


@triton.jit(do_not_specialize=["seed"])
def norm_kernel(
    x, u, weight, bias, out, mean_out, scale_out, u_stride, seed,
    WIDTH: tl.constexpr, EPS: tl.constexpr, GATED: tl.constexpr, LEVEL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`out = LayerNorm(x)`, or with GATED `dropout(LayerNorm(x) * u)`; one row a program.

    x, out [R, WIDTH] contiguous, rows of u are u_stride elements apart. mean_out, scale_out [R] float32: mean and
    1 / deviation. LEVEL: 2^16 times the share that is dropped.
    """
    row = tl.program_id(0)
    start = row.to(tl.int64) * WIDTH
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    values = tl.load(x + start + column, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(values, 0) / WIDTH
    centred = tl.where(inside, values - mean, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / WIDTH + EPS)
    result = centred * scale * tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    result += tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    if GATED:
        result *= tl.load(u + row.to(tl.int64) * u_stride + column, mask=inside, other=0.0).to(tl.float32)
        if LEVEL > 0:
            result = tl.where(_dropped(seed, row, LEVEL, BLOCK), 0.0, result * (65536.0 / (65536 - LEVEL)))
    tl.store(out + start + column, result.to(out.dtype.element_ty), mask=inside)
    tl.store(mean_out + row, mean)
    tl.store(scale_out + row, scale)


@triton.jit(do_not_specialize=["num_rows", "rows_each", "seed"])
def norm_gradients_kernel(
    grad, x, u, weight, bias, mean_in, scale_in, residual, grad_x, grad_u, gated, sums,
    num_rows, rows_each, u_stride, grad_u_stride, seed,
    WIDTH: tl.constexpr, GATED: tl.constexpr, LEVEL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of `norm_kernel`, for grad [R, WIDTH] of its result; rows_each rows a program.

    Writes grad_x, with `residual` added where not GATED; with GATED grad_u, whose rows are grad_u_stride apart, and
    `gated`, the result of the forward pass once more. sums [P, 2, WIDTH] float32: of weight and bias, of the own rows.
    """
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    w = tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)
    weight_sum = tl.zeros([BLOCK], tl.float32)
    bias_sum = tl.zeros([BLOCK], tl.float32)
    first = tl.program_id(0) * rows_each
    for row in range(first, tl.minimum(first + rows_each, num_rows)):
        start = tl.cast(row, tl.int64) * WIDTH
        values = tl.load(x + start + column, mask=inside, other=0.0).to(tl.float32)
        scale = tl.load(scale_in + row)
        normed = tl.where(inside, (values - tl.load(mean_in + row)) * scale, 0.0)
        g = tl.load(grad + start + column, mask=inside, other=0.0).to(tl.float32)
        if GATED:
            result = normed * w + b
            gate = tl.load(u + tl.cast(row, tl.int64) * u_stride + column, mask=inside, other=0.0).to(tl.float32)
            again = result * gate
            if LEVEL > 0:
                dropped = _dropped(seed, row, LEVEL, BLOCK)
                again = tl.where(dropped, 0.0, again * (65536.0 / (65536 - LEVEL)))
                g = tl.where(dropped, 0.0, g * (65536.0 / (65536 - LEVEL)))
            tl.store(gated + start + column, again.to(gated.dtype.element_ty), mask=inside)
            u_row = grad_u + tl.cast(row, tl.int64) * grad_u_stride
            tl.store(u_row + column, (g * result).to(grad_u.dtype.element_ty), mask=inside)
            g *= gate
        weight_sum += g * normed
        bias_sum += g
        g *= w
        found = (g - normed * (tl.sum(g * normed, 0) / WIDTH) - tl.sum(g, 0) / WIDTH) * scale
        if not GATED:
            found += tl.load(residual + start + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_x + start + column, found.to(grad_x.dtype.element_ty), mask=inside)
    own = sums + tl.program_id(0).to(tl.int64) * 2 * WIDTH
    tl.store(own + column, weight_sum, mask=inside)
    tl.store(own + WIDTH + column, bias_sum, mask=inside)


@triton.jit(do_not_specialize=["num_rows", "rows_each"])
def silu_gradients_kernel(
    grad, x, sums, num_rows, rows_each, WIDTH: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    """Make grad [R, WIDTH] of SiLU(x) that of x, in place, and add it up for the bias: sums [P, WIDTH] float32.

    Program (p, i) takes rows_each rows from p * rows_each on, and BLOCK columns.
    """
    column = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    total = tl.zeros([BLOCK_ROWS, BLOCK], tl.float32)
    first = tl.program_id(0) * rows_each
    end = tl.minimum(first + rows_each, num_rows)
    for start in range(first, end, BLOCK_ROWS):
        row = (start + tl.arange(0, BLOCK_ROWS))[:, None]
        inside = (row < end) & (column < WIDTH)
        place = row.to(tl.int64) * WIDTH + column
        values = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
        gate = 1 / (1 + tl.exp(-values))
        g = tl.load(grad + place, mask=inside, other=0.0).to(tl.float32) * gate * (1 + values * (1 - gate))
        tl.store(grad + place, g.to(grad.dtype.element_ty), mask=inside)
        total += g
    own = sums + tl.program_id(0).to(tl.int64) * WIDTH + column
    tl.store(own, tl.sum(total, 0)[None, :], mask=column < WIDTH)
