// The operators of this library as torch sees them: checks, the choice of the tile's type, the call.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cmath>

#include "attention.h"

namespace hstu {

// Whether bf16 is multiplied in matrix units here.
bool has_bf16_tiles() {
#ifdef HSTU_MATRIX_TILES
  return matrix_tiles_work();
#else
  return false;
#endif
}

template <typename scalar_t>
Rows<scalar_t> rows_of(const at::Tensor& x) {
  return {x.const_data_ptr<scalar_t>(), x.stride(0), x.stride(1)};
}

at::Tensor last_contiguous(const at::Tensor& x) { return x.stride(-1) == 1 ? x : x.contiguous(); }

template <typename tiles_t>
at::Tensor run(
    const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, std::vector<Sequence> sequences,
    const at::Tensor& pages, double alpha, int64_t scaling_seqlen) {
  using scalar_t = typename tiles_t::scalar_type;
  at::Tensor out = at::empty(q.sizes(), q.options());
  Pages<scalar_t> source;
  if (pages.defined()) {
    source = {pages.const_data_ptr<scalar_t>(), pages.stride(0), pages.stride(1), pages.stride(2), pages.stride(3),
              pages.size(2)};
  }
  if (out.numel()) {
    const Batch<scalar_t> batch{
        rows_of<scalar_t>(q), rows_of<scalar_t>(k), rows_of<scalar_t>(v), source, out.data_ptr<scalar_t>(),
        std::move(sequences), q.size(1), q.size(2), alpha, static_cast<double>(scaling_seqlen)};
    attention<tiles_t>(batch);
  }
  return out;
}

// The caller has checked what a user may get wrong; here is what would read beyond a tensor.
std::vector<Sequence> sequences_of(
    const at::Tensor& q, at::IntArrayRef offsets, at::IntArrayRef num_candidates, at::IntArrayRef page_indptr,
    at::IntArrayRef page_ids, at::IntArrayRef cached_lengths) {
  std::vector<Sequence> sequences;
  TORCH_CHECK_VALUE(offsets.size() == num_candidates.size() + 1, "offsets and num_candidates do not fit");
  for (size_t b = 0; b < num_candidates.size(); ++b) {
    const int64_t begin = offsets[b], length = offsets[b + 1] - begin;
    TORCH_CHECK_VALUE(begin >= 0 && length >= 0 && begin + length <= q.size(0), "offsets are not rows of q");
    TORCH_CHECK_VALUE(num_candidates[b] >= 0 && num_candidates[b] <= length, "more candidates than tokens");
    const bool paged = !page_indptr.empty();
    sequences.push_back(
        {begin, length, num_candidates[b], paged ? cached_lengths[b] : 0,
         paged ? page_ids.data() + page_indptr[b] : nullptr});
  }
  return sequences;
}

void check_like(const at::Tensor& q, const at::Tensor& x) {
  const bool like = x.sizes() == q.sizes() && x.scalar_type() == q.scalar_type() && x.is_cpu();
  TORCH_CHECK_VALUE(like, "k and v must be like q");
}

at::Tensor paged_attention(
    const at::Tensor& q_any, const at::Tensor& k_any, const at::Tensor& v_any, at::IntArrayRef offsets,
    at::IntArrayRef num_candidates, const std::optional<at::Tensor>& pages_any, at::IntArrayRef page_indptr,
    at::IntArrayRef page_ids, at::IntArrayRef cached_lengths, double alpha, int64_t scaling_seqlen) {
  TORCH_CHECK_VALUE(q_any.dim() == 3 && q_any.is_cpu(), "q must be [tokens, heads, head_dim] on the CPU");
  check_like(q_any, k_any);
  check_like(q_any, v_any);
  const at::Tensor q = last_contiguous(q_any), k = last_contiguous(k_any), v = last_contiguous(v_any);
  at::Tensor pages;
  if (pages_any) {
    TORCH_CHECK_VALUE(
        pages_any->dim() == 5 && pages_any->size(1) == 2 && pages_any->scalar_type() == q.scalar_type() &&
            pages_any->is_cpu() && pages_any->sizes().slice(3) == q.sizes().slice(1),
        "pages must be [num_pages, 2, page_size, heads, head_dim] like q");
    pages = last_contiguous(*pages_any);
    TORCH_CHECK_VALUE(
        page_indptr.size() == offsets.size() && cached_lengths.size() == num_candidates.size(),
        "page tables do not fit the sequences");
    for (size_t b = 0; b < cached_lengths.size(); ++b) {
      const int64_t held = page_indptr[b + 1] - page_indptr[b];
      TORCH_CHECK_VALUE(
          page_indptr[b] >= 0 && page_indptr[b + 1] <= static_cast<int64_t>(page_ids.size()) &&
              cached_lengths[b] >= 0 && cached_lengths[b] <= held * pages.size(2),
          "page tables hold too few pages");
    }
    for (const int64_t page : page_ids) {
      TORCH_CHECK_VALUE(page >= 0 && page < pages.size(0), "no page ", page);
    }
  }
  std::vector<Sequence> sequences = sequences_of(q, offsets, num_candidates, page_indptr, page_ids, cached_lengths);
  auto call = [&]<typename tiles_t>() { return run<tiles_t>(q, k, v, std::move(sequences), pages, alpha, scaling_seqlen); };
  switch (q.scalar_type()) {
    case at::kBFloat16:
#ifdef HSTU_MATRIX_TILES
      if (matrix_tiles_work()) return call.template operator()<MatrixTiles>();
#endif
      return call.template operator()<VectorTiles<at::BFloat16, float>>();
    case at::kHalf:
      return call.template operator()<VectorTiles<at::Half, float>>();
    case at::kFloat:
      return call.template operator()<VectorTiles<float, float>>();
    case at::kDouble:
      return call.template operator()<VectorTiles<double, double>>();
    default:
      TORCH_CHECK_VALUE(false, "no native attention for ", q.scalar_type());
  }
}

}  // namespace hstu

TORCH_LIBRARY(hstu_native, library) {
  library.def(
      "attention(Tensor q, Tensor k, Tensor v, int[] offsets, int[] num_candidates, Tensor? pages, int[] page_indptr, "
      "int[] page_ids, int[] cached_lengths, float alpha, int scaling_seqlen) -> Tensor");
  library.def("has_bf16_tiles() -> bool", &hstu::has_bf16_tiles);
}

TORCH_LIBRARY_IMPL(hstu_native, CPU, library) { library.impl("attention", &hstu::paged_attention); }
