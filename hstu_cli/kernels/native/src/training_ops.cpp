// The operators of training as torch sees them: checks, the choice of the tile's type, the call.

#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include "gradients.h"
#include "matrix_gradients.h"
#include "tensors.h"
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
#ifdef HSTU_MATRIX_TILES
      if (matrix_tiles_work()) return call.template operator()<MatrixGradientTiles>();
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

}  // namespace hstu

TORCH_LIBRARY_FRAGMENT(hstu_native, library) {
  library.def(
      "attention_gradients(Tensor q, Tensor k, Tensor v, Tensor grad_out, int[] offsets, int[] num_candidates, float "
      "alpha, int scaling_seqlen, Tensor(a!) grad_q, Tensor(b!) grad_k, Tensor(c!) grad_v) -> ()");
}

TORCH_LIBRARY_IMPL(hstu_native, CPU, library) { library.impl("attention_gradients", &hstu::gradients); }
