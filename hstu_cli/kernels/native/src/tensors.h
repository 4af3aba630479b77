// What operators check of torch's tensors, and tensors as rows.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "plan.h"

namespace hstu {

template <typename scalar_t>
Rows<scalar_t> rows_of(const at::Tensor& x) {
  return {x.const_data_ptr<scalar_t>(), x.stride(0), x.stride(1)};
}

inline at::Tensor last_contiguous(const at::Tensor& x) { return x.stride(-1) == 1 ? x : x.contiguous(); }

// The caller has checked what a user may get wrong; here is what would read beyond a tensor.
inline std::vector<Sequence> sequences_of(
    const at::Tensor& q, at::IntArrayRef offsets, at::IntArrayRef num_candidates, at::IntArrayRef page_indptr = {},
    at::IntArrayRef page_ids = {}, at::IntArrayRef cached_lengths = {}) {
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

inline void check_like(const at::Tensor& q, const at::Tensor& x) {
  const bool like = x.sizes() == q.sizes() && x.scalar_type() == q.scalar_type() && x.is_cpu();
  TORCH_CHECK_VALUE(like, "tensors must be like the first one");
}

}  // namespace hstu
