// The operators of training as torch sees them: checks, the choice of the tile's type, the call.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <tuple>

#include "gradients.h"
#include "matrix_gradients.h"
#include "matrix_product.h"
#include "tensors.h"
#include "training_rows.h"
#include "vector_gradients.h"

namespace hstu {

template <typename tiles_t>
void run_gradients(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const at::Tensor& grad_out,
    std::vector<Sequence> sequences, double alpha, int64_t scaling_seqlen, const at::Tensor& grad_q,
    const at::Tensor& grad_k, const at::Tensor& grad_v) {
  using scalar_t = typename tiles_t::scalar_type;
  auto mutable_rows = [](const at::Tensor& x) {
    return MutableRows<scalar_t>{x.data_ptr<scalar_t>(), x.stride(0), x.stride(1)};
  };
  attention_gradients<tiles_t>(
      {rows_of<scalar_t>(q), rows_of<scalar_t>(k), rows_of<scalar_t>(v), rows_of<scalar_t>(grad_out),
       mutable_rows(grad_q), mutable_rows(grad_k), mutable_rows(grad_v), std::move(sequences), q.size(1), q.size(2),
       alpha, static_cast<double>(scaling_seqlen)});
}

// Gradients of q, k and v of hstu_native::attention without pages, written to grad_q, grad_k and grad_v.
void gradients(
    const at::Tensor& q_any, const at::Tensor& k_any, const at::Tensor& v_any, const at::Tensor& grad_any,
    at::IntArrayRef offsets, at::IntArrayRef num_candidates, double alpha, int64_t scaling_seqlen,
    const at::Tensor& grad_q, const at::Tensor& grad_k, const at::Tensor& grad_v) {
  TORCH_CHECK_VALUE(q_any.dim() == 3 && q_any.is_cpu(), "q must be [tokens, heads, head_dim] on the CPU");
  for (const at::Tensor& x : {k_any, v_any, grad_any, grad_q, grad_k, grad_v}) check_like(q_any, x);
  for (const at::Tensor& x : {grad_q, grad_k, grad_v}) {
    TORCH_CHECK_VALUE(x.size(2) <= 1 || x.stride(2) == 1, "rows of gradients must be contiguous");
  }
  std::vector<Sequence> sequences = sequences_of(q_any, offsets, num_candidates);
  if (!q_any.numel()) return;
  const at::Tensor q = last_contiguous(q_any), k = last_contiguous(k_any), v = last_contiguous(v_any);
  const at::Tensor grad = last_contiguous(grad_any);
  auto call = [&]<typename tiles_t>() {
    run_gradients<tiles_t>(q, k, v, grad, std::move(sequences), alpha, scaling_seqlen, grad_q, grad_k, grad_v);
  };
  switch (q.scalar_type()) {
    case at::kBFloat16:
#ifdef HSTU_BF16_TILES
      if (tile_units_work()) return call.template operator()<MatrixGradientTiles>();
#endif
      return call.template operator()<VectorGradientTiles<at::BFloat16, float>>();
    case at::kHalf:
      return call.template operator()<VectorGradientTiles<at::Half, float>>();
    case at::kFloat:
      return call.template operator()<VectorGradientTiles<float, float>>();
    case at::kDouble:
      return call.template operator()<VectorGradientTiles<double, double>>();
    default:
      TORCH_CHECK_VALUE(false, "no native attention for ", q.scalar_type());
  }
}

// Calls f with float or, where any of the tensors is double, with double.
template <typename f_t>
auto with_real(std::initializer_list<at::Tensor> tensors, const f_t& f) {
  for (const at::Tensor& x : tensors) {
    TORCH_CHECK_VALUE(x.is_cpu() && at::isFloatingType(x.scalar_type()), "tensors must be floating on the CPU");
  }
  const bool wide = std::any_of(tensors.begin(), tensors.end(), [](const at::Tensor& x) {
    return x.scalar_type() == at::kDouble;
  });
  return wide ? f(double()) : f(float());
}

void check_rows(const at::Tensor& x, int64_t rows, int64_t width) {
  TORCH_CHECK_VALUE(
      x.dim() == 2 && x.is_cpu() && x.size(0) == rows && x.size(1) == width && (width <= 1 || x.stride(1) == 1),
      "tensors must be [", rows, ", ", width, "] with contiguous rows");
}

template <typename real_t>
at::Tensor as_real(const at::Tensor& x) {
  return x.to(c10::CppTypeToScalarType<real_t>::value).contiguous();
}

template <typename real_t>
Norm<real_t> norm_of(
    const at::Tensor& x, bool gated, const at::Tensor& weight, const at::Tensor& bias, double eps, int64_t seed,
    int64_t level) {
  const int64_t width = x.size(1);
  TORCH_CHECK_VALUE(weight.numel() == width && bias.numel() == width, "weight and bias must be like a row of x");
  TORCH_CHECK_VALUE(level >= 0 && level < 65536, "level must be from 0 to 65535");
  return {x.size(0), width, weight.const_data_ptr<real_t>(), bias.const_data_ptr<real_t>(), eps, gated, {seed, level}};
}

// LayerNorm(x) in a dtype, or with u dropout(LayerNorm(x) * u); of each row the mean and 1 / deviation.
std::tuple<at::Tensor, at::Tensor, at::Tensor> norm_kept(
    const at::Tensor& x_any, const std::optional<at::Tensor>& u_any, const at::Tensor& weight, const at::Tensor& bias,
    double eps, at::ScalarType dtype, int64_t seed, int64_t level) {
  TORCH_CHECK_VALUE(x_any.dim() == 2, "x must be [rows, width]");
  const at::Tensor x = last_contiguous(x_any), u = u_any ? last_contiguous(*u_any) : x;
  check_rows(u, x.size(0), x.size(1));
  at::Tensor out = at::empty(x.sizes(), x.options().dtype(dtype));
  return with_real({x, u, weight, bias, out}, [&]<typename real_t>(real_t) {
    const auto real = x.options().dtype(c10::CppTypeToScalarType<real_t>::value);
    const at::Tensor w = as_real<real_t>(weight), b = as_real<real_t>(bias);
    at::Tensor mean = at::empty({x.size(0)}, real), scale = at::empty({x.size(0)}, real);
    if (out.numel()) {
      norm_of<real_t>(x, u_any.has_value(), w, b, eps, seed, level)
          .forward(
              AnyRows<real_t>(x), AnyRows<real_t>(u), AnyRows<real_t>(out), mean.data_ptr<real_t>(),
              scale.data_ptr<real_t>());
    }
    return std::make_tuple(out, mean, scale);
  });
}

// For grad of norm_kept's result: writes the gradient of x, plus residual or, of a gated norm, that of u to grad_u and
// the result once more to gated. Returns the gradients of weight and bias, [2, width].
at::Tensor norm_gradients(
    const at::Tensor& grad_any, const at::Tensor& x_any, const std::optional<at::Tensor>& u_any,
    const at::Tensor& mean, const at::Tensor& scale, const at::Tensor& weight, const at::Tensor& bias,
    const std::optional<at::Tensor>& residual_any, const at::Tensor& grad_x, const std::optional<at::Tensor>& grad_u,
    const std::optional<at::Tensor>& gated, int64_t seed, int64_t level) {
  TORCH_CHECK_VALUE(x_any.dim() == 2, "x must be [rows, width]");
  TORCH_CHECK_VALUE(
      u_any.has_value() == grad_u.has_value() && u_any.has_value() == gated.has_value() &&
          u_any.has_value() != residual_any.has_value(),
      "u, grad_u and gated come together, without them a residual");
  const at::Tensor grad = last_contiguous(grad_any), x = last_contiguous(x_any);
  const at::Tensor u = u_any ? last_contiguous(*u_any) : x, other = residual_any ? last_contiguous(*residual_any) : x;
  for (const at::Tensor& one : {grad, u, other, grad_x, grad_u.value_or(x), gated.value_or(x)}) {
    check_rows(one, x.size(0), x.size(1));
  }
  return with_real({grad, x, u, mean, scale, weight, bias, other, grad_x}, [&]<typename real_t>(real_t) {
    const at::Tensor w = as_real<real_t>(weight), b = as_real<real_t>(bias);
    const at::Tensor m = as_real<real_t>(mean), s = as_real<real_t>(scale);
    TORCH_CHECK_VALUE(m.numel() == x.size(0) && s.numel() == x.size(0), "mean and scale must hold one for each row");
    at::Tensor sums = at::empty({2, x.size(1)}, w.options());
    norm_of<real_t>(x, u_any.has_value(), w, b, 0.0, seed, level)
        .backward(
            AnyRows<real_t>(grad), AnyRows<real_t>(x), AnyRows<real_t>(u), m.template const_data_ptr<real_t>(),
            s.template const_data_ptr<real_t>(), AnyRows<real_t>(other), AnyRows<real_t>(grad_x),
            AnyRows<real_t>(grad_u.value_or(x)), AnyRows<real_t>(gated.value_or(x)),
            sums.template data_ptr<real_t>());
    return sums;
  });
}

at::Tensor silu(const at::Tensor& x_any) {
  TORCH_CHECK_VALUE(x_any.dim() == 2, "x must be [rows, width]");
  const at::Tensor x = last_contiguous(x_any);
  at::Tensor out = at::empty(x.sizes(), x.options());
  const int64_t rows = x.size(0), width = x.size(1);
  with_real({x}, [&]<typename real_t>(real_t) {
    const AnyRows<real_t> from(x), to(out);
    const int64_t grain = std::max<int64_t>(1, ROW_GRAIN / std::max<int64_t>(1, width));
    parallel_for(rows, grain, [&](int64_t i, int64_t end) {
      std::vector<real_t> row(width);
      for (; i < end; ++i) {
        from.load(i, width, row.data());
        activate_row(row.data(), width, x.scalar_type() == at::kBFloat16);
        to.store(i, width, row.data());
      }
    });
  });
  return out;
}

// Makes grad, of SiLU's result, that of x, in place; returns its sum over the rows, [width].
at::Tensor silu_gradients_of(const at::Tensor& grad, const at::Tensor& x_any) {
  TORCH_CHECK_VALUE(x_any.dim() == 2, "x must be [rows, width]");
  const at::Tensor x = last_contiguous(x_any);
  check_rows(grad, x.size(0), x.size(1));
  return with_real({grad, x}, [&]<typename real_t>(real_t) {
    at::Tensor sums = at::empty({x.size(1)}, x.options().dtype(c10::CppTypeToScalarType<real_t>::value));
    silu_gradients<real_t>(
        AnyRows<real_t>(grad), AnyRows<real_t>(x), x.size(0), x.size(1), sums.template data_ptr<real_t>());
    return sums;
  });
}

// Which elements norm_kept drops, bool [rows, width].
at::Tensor dropout_mask(int64_t rows, int64_t width, int64_t seed, int64_t level) {
  at::Tensor mask = at::empty({rows, width}, at::kBool);
  const Dropout dropout{seed, level};
  std::vector<uint16_t> numbers(Dropout::padded(width));
  for (int64_t i = 0; i < rows; ++i) {
    dropout.draw(i, width, numbers.data());
    bool* row = mask.data_ptr<bool>() + i * width;
    for (int64_t c = 0; c < width; ++c) row[c] = numbers[c] < level;
  }
  return mask;
}

#ifdef HSTU_BF16_TILES
Matrix matrix_of(const at::Tensor& x) {
  TORCH_CHECK(tile_units_work(), "no bf16 tiles here");
  TORCH_CHECK_VALUE(
      x.dim() == 2 && x.is_cpu() && x.scalar_type() == at::kBFloat16 && (x.size(1) <= 1 || x.stride(1) == 1),
      "tensors must be bf16 with contiguous rows");
  return {x.const_data_ptr<bf16>(), x.size(0), x.size(1), x.stride(0)};
}

// x W' + b, and SiLU of it as it is rounded; x [rows, in], weight [out, in], bias [out].
std::tuple<at::Tensor, at::Tensor> linear_silu_kept(
    const at::Tensor& x_any, const at::Tensor& weight_any, const at::Tensor& bias_any) {
  const at::Tensor x = last_contiguous(x_any), weight = weight_any.contiguous(), bias = bias_any.contiguous();
  const Matrix left = matrix_of(x), right = matrix_of(weight);
  TORCH_CHECK_VALUE(
      left.columns == right.columns && bias.numel() == right.rows && bias.scalar_type() == at::kBFloat16,
      "weight and bias do not fit x");
  at::Tensor linear = at::empty({left.rows, right.rows}, x.options()), activated = at::empty_like(linear);
  if (linear.numel()) {
    multiply_matrices(
        left, false, RightOperand(right, true),
        StoreActivated{
            bias.const_data_ptr<bf16>(), {linear.data_ptr<bf16>(), left.rows, right.rows},
            {activated.data_ptr<bf16>(), left.rows, right.rows}});
  }
  return {linear, activated};
}

// a b, or with `transpose_a` a' b, or with `transpose_b` a b'; plus residual where there is one.
at::Tensor product(
    const at::Tensor& a_any, const at::Tensor& b_any, bool transpose_a, bool transpose_b,
    const std::optional<at::Tensor>& residual_any) {
  const at::Tensor a = last_contiguous(a_any), b = transpose_b ? b_any.contiguous() : last_contiguous(b_any);
  const Matrix left = matrix_of(a), right = matrix_of(b);
  const int64_t rows = transpose_a ? left.columns : left.rows, columns = transpose_b ? right.rows : right.columns;
  TORCH_CHECK_VALUE(
      (transpose_a ? left.rows : left.columns) == (transpose_b ? right.columns : right.rows), "matrices do not fit");
  at::Tensor out = at::empty({rows, columns}, a.options());
  if (!out.numel()) return out;
  if (!a.numel()) return residual_any ? out.copy_(*residual_any) : out.zero_();
  const StoreRows store(out.data_ptr<bf16>(), rows, columns);
  if (residual_any) {
    const at::Tensor residual = last_contiguous(*residual_any);
    const Matrix other = matrix_of(residual);
    check_rows(residual, rows, columns);
    multiply_matrices(left, transpose_a, RightOperand(right, transpose_b), StoreSum{other.data, other.stride, store});
  } else {
    multiply_matrices(left, transpose_a, RightOperand(right, transpose_b), store);
  }
  return out;
}
#endif

}  // namespace hstu

TORCH_LIBRARY_FRAGMENT(hstu_native, library) {
  library.def(
      "attention_gradients(Tensor q, Tensor k, Tensor v, Tensor grad_out, int[] offsets, int[] num_candidates, float "
      "alpha, int scaling_seqlen, Tensor(a!) grad_q, Tensor(b!) grad_k, Tensor(c!) grad_v) -> ()");
  library.def(
      "norm_kept(Tensor x, Tensor? u, Tensor weight, Tensor bias, float eps, ScalarType dtype, int seed, int level) -> "
      "(Tensor, Tensor, Tensor)");
  library.def(
      "norm_gradients(Tensor grad, Tensor x, Tensor? u, Tensor mean, Tensor scale, Tensor weight, Tensor bias, Tensor? "
      "residual, Tensor(a!) grad_x, Tensor(b!)? grad_u, Tensor(c!)? gated, int seed, int level) -> Tensor");
  library.def("silu(Tensor x) -> Tensor");
  library.def("silu_gradients(Tensor(a!) grad, Tensor x) -> Tensor");
  library.def("dropout_mask(int rows, int width, int seed, int level) -> Tensor", &hstu::dropout_mask);
#ifdef HSTU_BF16_TILES
  library.def("linear_silu_kept(Tensor x, Tensor weight, Tensor bias) -> (Tensor, Tensor)");
  library.def("product(Tensor a, Tensor b, bool transpose_a, bool transpose_b, Tensor? residual) -> Tensor");
#endif
}

TORCH_LIBRARY_IMPL(hstu_native, CPU, library) {
  library.impl("attention_gradients", &hstu::gradients);
  library.impl("norm_kept", &hstu::norm_kept);
  library.impl("norm_gradients", &hstu::norm_gradients);
  library.impl("silu", &hstu::silu);
  library.impl("silu_gradients", &hstu::silu_gradients_of);
#ifdef HSTU_BF16_TILES
  library.impl("linear_silu_kept", &hstu::linear_silu_kept);
  library.impl("product", &hstu::product);
#endif
}
