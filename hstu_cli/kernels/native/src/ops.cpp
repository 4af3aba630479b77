// The operators of this library as torch sees them: checks, the choice of the tile's type, the call.

#include <ATen/Dispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <cmath>
#include <string>

#include "attention.h"
#include "matrix_linear.h"
#include "rows.h"
#include "tensors.h"

namespace hstu {

// What multiplies tiles of bf16 here; empty where nothing does.
std::string bf16_tile_units() {
#ifdef HSTU_BF16_TILES
  if (tile_units_work()) return TILE_UNITS;
#endif
  return "";
}

bool has_bf16_tiles() { return !bf16_tile_units().empty(); }

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
    const bool stream = out.numel() >= STREAMED && reinterpret_cast<uintptr_t>(out.data_ptr()) % 64 == 0;
    const Batch<scalar_t> batch{
        rows_of<scalar_t>(q), rows_of<scalar_t>(k), rows_of<scalar_t>(v), source, out.data_ptr<scalar_t>(),
        std::move(sequences), q.size(1), q.size(2), alpha, static_cast<double>(scaling_seqlen),
        stream};
    attention<tiles_t>(batch);
  }
  return out;
}

// Pages and their tables, if there are any, for so many sequences.
void check_pages(
    const std::optional<at::Tensor>& pages, at::ScalarType dtype, int64_t num_heads, int64_t head_dim,
    size_t num_sequences, at::IntArrayRef offsets, at::IntArrayRef page_indptr, at::IntArrayRef page_ids,
    at::IntArrayRef cached_lengths) {
  TORCH_CHECK_VALUE(offsets.size() == num_sequences + 1, "offsets and num_candidates do not fit");
  TORCH_CHECK_VALUE(pages.has_value() == !page_indptr.empty(), "pages and their tables come together");
  if (!pages) return;
  TORCH_CHECK_VALUE(
      pages->dim() == 5 && pages->size(1) == 2 && pages->scalar_type() == dtype && pages->is_cpu() &&
          pages->size(3) == num_heads && pages->size(4) == head_dim,
      "pages must be [num_pages, 2, page_size, heads, head_dim] like q");
  TORCH_CHECK_VALUE(
      page_indptr.size() == offsets.size() && cached_lengths.size() == num_sequences,
      "page tables do not fit the sequences");
  for (size_t b = 0; b < num_sequences; ++b) {
    const int64_t held = page_indptr[b + 1] - page_indptr[b];
    TORCH_CHECK_VALUE(
        page_indptr[b] >= 0 && page_indptr[b + 1] <= static_cast<int64_t>(page_ids.size()) && cached_lengths[b] >= 0 &&
            cached_lengths[b] <= held * pages->size(2),
        "page tables hold too few pages");
  }
  for (const int64_t page : page_ids) {
    TORCH_CHECK_VALUE(page >= 0 && page < pages->size(0), "no page ", page);
  }
}

at::Tensor paged_attention(
    const at::Tensor& q_any, const at::Tensor& k_any, const at::Tensor& v_any, at::IntArrayRef offsets,
    at::IntArrayRef num_candidates, const std::optional<at::Tensor>& pages_any, at::IntArrayRef page_indptr,
    at::IntArrayRef page_ids, at::IntArrayRef cached_lengths, double alpha, int64_t scaling_seqlen) {
  TORCH_CHECK_VALUE(q_any.dim() == 3 && q_any.is_cpu(), "q must be [tokens, heads, head_dim] on the CPU");
  check_like(q_any, k_any);
  check_like(q_any, v_any);
  const at::Tensor q = last_contiguous(q_any), k = last_contiguous(k_any), v = last_contiguous(v_any);
  check_pages(
      pages_any, q.scalar_type(), q.size(1), q.size(2), num_candidates.size(), offsets, page_indptr, page_ids,
      cached_lengths);
  const at::Tensor pages = pages_any ? last_contiguous(*pages_any) : at::Tensor();
  std::vector<Sequence> sequences = sequences_of(q, offsets, num_candidates, page_indptr, page_ids, cached_lengths);
  auto call = [&]<typename tiles_t>() {
    return run<tiles_t>(q, k, v, std::move(sequences), pages, alpha, scaling_seqlen);
  };
  switch (q.scalar_type()) {
    case at::kBFloat16:
#ifdef HSTU_BF16_TILES
      if (tile_units_work()) return call.template operator()<MatrixTiles>();
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

// A layer norm's input, parameters and, where there is one, what its result is multiplied with, checked.
struct NormedInput {
  at::Tensor x, u, weight, bias;
  double eps;

  NormedInput(
      const at::Tensor& x_any, const std::optional<at::Tensor>& u_any, const at::Tensor& weight_any,
      const at::Tensor& bias_any, double eps)
      : eps(eps) {
    TORCH_CHECK_VALUE(x_any.dim() == 2 && x_any.is_cpu(), "x must be [rows, width] on the CPU");
    x = last_contiguous(x_any);
    weight = weight_any.contiguous();
    bias = bias_any.contiguous();
    for (const at::Tensor& parameter : {weight, bias}) {
      const bool fits = parameter.numel() == x.size(1) && parameter.scalar_type() == x.scalar_type();
      TORCH_CHECK_VALUE(fits, "weight and bias must be like a row of x");
    }
    if (u_any) {
      check_like(x, *u_any);
      u = last_contiguous(*u_any);
    }
  }

  // What the result is multiplied with, or null.
  template <typename scalar_t>
  const scalar_t* factors() const {
    return u.defined() ? u.const_data_ptr<scalar_t>() : nullptr;
  }

  int64_t factor_stride() const { return u.defined() ? u.stride(0) : 0; }

  at::Tensor run() const {
    at::Tensor out = at::empty(x.sizes(), x.options());
    if (!out.numel()) return out;
    AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "layer_norm", [&] {
      layer_norm<scalar_t>(
          x.const_data_ptr<scalar_t>(), x.stride(0), factors<scalar_t>(), factor_stride(),
          weight.const_data_ptr<scalar_t>(), bias.const_data_ptr<scalar_t>(), eps, x.size(0), x.size(1),
          out.data_ptr<scalar_t>());
    });
    return out;
  }
};

at::Tensor norm(
    const at::Tensor& x, const std::optional<at::Tensor>& u, const at::Tensor& weight, const at::Tensor& bias,
    double eps) {
  return NormedInput(x, u, weight, bias, eps).run();
}

// Rows of k and v, [tokens, heads, head_dim], to slots of pages [num_pages, 2, page_size, heads, head_dim].
void append(
    const at::Tensor& k, const at::Tensor& v, const at::Tensor& rows, const at::Tensor& pages,
    const at::Tensor& slots) {
  TORCH_CHECK_VALUE(pages.dim() == 5 && pages.is_contiguous() && pages.is_cpu(), "pages must be contiguous on the CPU");
  TORCH_CHECK_VALUE(
      rows.scalar_type() == at::kLong && slots.scalar_type() == at::kLong && rows.sizes() == slots.sizes(),
      "rows and slots must be int64");
  TORCH_CHECK_VALUE(rows.is_cpu() && slots.is_cpu(), "rows and slots must be on the CPU");
  TORCH_CHECK_VALUE(k.dim() == 3 && k.sizes() == v.sizes(), "k and v must be [tokens, heads, head_dim] alike");
  const at::Tensor from = rows.contiguous(), to = slots.contiguous();
  const int64_t *row = from.const_data_ptr<int64_t>(), *slot = to.const_data_ptr<int64_t>();
  const int64_t page_size = pages.size(2), count = from.numel();
  for (int64_t i = 0; i < count; ++i) {
    TORCH_CHECK_VALUE(row[i] >= 0 && row[i] < k.size(0), "no row ", row[i]);
    TORCH_CHECK_VALUE(slot[i] >= 0 && slot[i] < pages.size(0) * page_size, "no slot ", slot[i]);
  }
  for (int64_t kind = 0; kind < 2; ++kind) {
    const at::Tensor& any = kind ? v : k;
    TORCH_CHECK_VALUE(
        any.is_cpu() && any.scalar_type() == pages.scalar_type() && any.sizes().slice(1) == pages.sizes().slice(3),
        "k and v must be like the pages");
    // Rows whose heads do not follow each other are copied together first.
    const at::Tensor source = any.stride(2) == 1 && any.stride(1) == any.size(2) ? any : any.contiguous();
    const auto bytes = static_cast<int64_t>(any.element_size()) * any.size(1) * any.size(2);
    const char* data = static_cast<const char*>(source.const_data_ptr());
    char* target = static_cast<char*>(pages.data_ptr());
    const int64_t stride = source.stride(0) * static_cast<int64_t>(any.element_size());
    copy_rows(
        count, bytes, [&](int64_t i) { return data + row[i] * stride; },
        [&](int64_t i) {
          return target + ((slot[i] / page_size * 2 + kind) * page_size + slot[i] % page_size) * bytes;
        });
  }
}

#ifdef HSTU_BF16_TILES
// Multiplies 32 x 256 by 256 x 32 over and over on every thread, from the first-level cache: what tiles give where
// nothing holds them up. Returns the FLOPs.
int64_t multiply_tiles(int64_t repeats) {
  constexpr int64_t STEPS = 8;
  TORCH_CHECK(tile_units_work(), "no bf16 tiles here");
  const int64_t threads = at::get_num_threads();
  parallel_for(threads, 1, [&](int64_t begin, int64_t end) {
    alignas(64) bf16 operands[4 * STEPS * TILE];
    alignas(64) float sums[4 * SUM_TILE];
    for (int64_t i = 0; i < 4 * STEPS * TILE; ++i) operands[i] = static_cast<float>(i % 7 - 3);
    TileSession session;
    for (int64_t i = 0; i < repeats * (end - begin); ++i) {
      const bf16* right = operands + 2 * STEPS * TILE;
      multiply_steps(STEPS, {operands, operands + STEPS * TILE}, {right, right + STEPS * TILE}, {sums});
    }
  });
  return 2 * 32 * 32 * STEPS * STEP * repeats * threads;
}

void check_bf16_rows(const at::Tensor& x, const char* name) {
  TORCH_CHECK_VALUE(
      x.dim() == 2 && x.is_cpu() && x.scalar_type() == at::kBFloat16, name, " must be bf16 [rows, width] on the CPU");
}

at::Tensor pack_weight(const at::Tensor& weight_any) {
  check_bf16_rows(weight_any, "weight");
  const at::Tensor weight = weight_any.contiguous();
  const PackedWeight shape{weight.size(0), weight.size(1)};
  at::Tensor packed = at::empty({shape.size()}, weight.options());
  advise_huge_pages(packed.data_ptr(), packed.nbytes());
  shape.pack(weight.const_data_ptr<bf16>(), packed.data_ptr<bf16>());
  return packed;
}

// Of the rows of a source, which x is or becomes: [num_parts, rows, out / num_parts].
template <typename source_t, typename finish_t>
at::Tensor run_linear(
    const at::Tensor& x, const source_t& source, const at::Tensor& packed, int64_t out_width, int64_t num_parts,
    const finish_t& finish) {
  const PackedWeight weight{out_width, x.size(1)};
  TORCH_CHECK_VALUE(
      packed.numel() == weight.size() && packed.scalar_type() == at::kBFloat16 && packed.is_cpu() &&
          packed.is_contiguous() && x.size(1) > 0,
      "weight packed for other widths");
  TORCH_CHECK_VALUE(
      num_parts == 1 || (num_parts > 1 && out_width % (num_parts * PackedWeight::COLUMNS) == 0),
      "parts must have a multiple of 32 columns");
  at::Tensor y = at::empty({num_parts, x.size(0), out_width / num_parts}, x.options());
  if (y.numel()) {
    linear(source, x.size(0), packed.const_data_ptr<bf16>(), weight, y.data_ptr<bf16>(), y.size(2), finish);
  }
  return y;
}

template <typename finish_t>
at::Tensor run_linear(
    const at::Tensor& x_any, const at::Tensor& packed, int64_t out_width, int64_t num_parts, const finish_t& finish) {
  check_bf16_rows(x_any, "x");
  const at::Tensor x = last_contiguous(x_any);
  return run_linear(
      x, PlainRows{x.const_data_ptr<bf16>(), x.stride(0)}, packed, out_width, num_parts, finish);
}

// Of the layer norm of rows. Those that several threads would bring into tiles are normed first, by all together.
template <typename finish_t>
at::Tensor run_linear(
    const NormedInput& norm, const at::Tensor& packed, int64_t out_width, int64_t num_parts, const finish_t& finish) {
  check_bf16_rows(norm.x, "x");
  const int64_t width = norm.x.size(1);
  const Division division = divide(norm.x.size(0), finish_t::MOST_ROWS, {out_width, width});
  if (division.parts > 1) return run_linear(norm.run(), packed, out_width, num_parts, finish);
  const NormParameters<bf16> parameters(norm.weight.const_data_ptr<bf16>(), norm.bias.const_data_ptr<bf16>(), width);
  const NormedRows source{norm.x.const_data_ptr<bf16>(), norm.factors<bf16>(), norm.x.stride(0), norm.factor_stride(),
                          parameters.weight(),           parameters.bias(),    norm.eps};
  return run_linear(norm.x, source, packed, out_width, num_parts, finish);
}

// Takes x, or a norm and its x, to SiLU(x W' + b).
template <typename rows_t>
at::Tensor run_linear_silu(
    const rows_t& rows, const at::Tensor& packed, const at::Tensor& bias_any, int64_t num_parts) {
  TORCH_CHECK_VALUE(bias_any.dim() == 1 && bias_any.scalar_type() == at::kBFloat16, "bias must be bf16 [out]");
  const at::Tensor bias = bias_any.contiguous();
  return run_linear(rows, packed, bias.size(0), num_parts, BiasSilu{bias.const_data_ptr<bf16>()});
}

template <typename rows_t>
at::Tensor run_linear_residual(
    const at::Tensor& x, const rows_t& rows, const at::Tensor& packed, const at::Tensor& residual_any) {
  check_bf16_rows(x, "x");
  check_bf16_rows(residual_any, "residual");
  TORCH_CHECK_VALUE(residual_any.size(0) == x.size(0), "residual must have as many rows as x");
  const at::Tensor residual = last_contiguous(residual_any);
  const AddResidual finish{residual.const_data_ptr<bf16>(), residual.stride(0)};
  return run_linear(rows, packed, residual.size(1), 1, finish).squeeze(0);
}

at::Tensor linear_silu(const at::Tensor& x, const at::Tensor& packed, const at::Tensor& bias, int64_t num_parts) {
  return run_linear_silu(x, packed, bias, num_parts);
}

at::Tensor linear_residual(const at::Tensor& x, const at::Tensor& packed, const at::Tensor& residual) {
  return run_linear_residual(x, x, packed, residual);
}

at::Tensor norm_linear_silu(
    const at::Tensor& x, const at::Tensor& norm_weight, const at::Tensor& norm_bias, double eps,
    const at::Tensor& packed, const at::Tensor& bias, int64_t num_parts) {
  return run_linear_silu(NormedInput(x, std::nullopt, norm_weight, norm_bias, eps), packed, bias, num_parts);
}

at::Tensor norm_mul_linear_residual(
    const at::Tensor& x, const at::Tensor& u, const at::Tensor& norm_weight, const at::Tensor& norm_bias, double eps,
    const at::Tensor& packed, const at::Tensor& residual) {
  return run_linear_residual(x, NormedInput(x, u, norm_weight, norm_bias, eps), packed, residual);
}

// A whole layer of inference: its four operators, one behind the other, without a way back to the interpreter between
// them. By then a caller's code has left the caches, and comes from memory again.
at::Tensor layer(
    const at::Tensor& x, const at::Tensor& input_norm_weight, const at::Tensor& input_norm_bias,
    const at::Tensor& packed_uvqk, const at::Tensor& uvqk_bias, const at::Tensor& output_norm_weight,
    const at::Tensor& output_norm_bias, const at::Tensor& packed_output, double eps, int64_t num_heads,
    at::IntArrayRef offsets, at::IntArrayRef num_candidates, const std::optional<at::Tensor>& pages,
    const std::optional<at::Tensor>& new_rows, const std::optional<at::Tensor>& new_slots,
    at::IntArrayRef page_indptr, at::IntArrayRef page_ids, at::IntArrayRef cached_lengths, double alpha,
    int64_t scaling_seqlen) {
  const int64_t inner = output_norm_weight.numel();
  TORCH_CHECK_VALUE(
      num_heads > 0 && inner % num_heads == 0 && uvqk_bias.numel() == 4 * inner, "weights do not fit the heads");
  TORCH_CHECK_VALUE(!offsets.empty() && x.dim() == 2 && offsets.back() == x.size(0), "offsets do not fit x");
  TORCH_CHECK_VALUE(
      new_rows.has_value() == new_slots.has_value() && (pages || !new_rows), "pages, rows and slots come together");
  check_pages(
      pages, x.scalar_type(), num_heads, inner / num_heads, num_candidates.size(), offsets, page_indptr, page_ids,
      cached_lengths);  // before anything is stored
  const bool separate = inner % PackedWeight::COLUMNS == 0;  // parts have memory of their own then
  const at::Tensor uvqk =
      norm_linear_silu(x, input_norm_weight, input_norm_bias, eps, packed_uvqk, uvqk_bias, separate ? 4 : 1);
  const auto part = [&](int64_t i) {
    return separate ? uvqk.select(0, i) : uvqk.select(0, 0).narrow(1, i * inner, inner);
  };
  const auto heads = [&](int64_t i) { return part(i).unflatten(1, {num_heads, inner / num_heads}); };
  const at::Tensor v = heads(1), q = heads(2), k = heads(3);
  if (new_rows) append(k, v, *new_rows, *pages, *new_slots);
  const at::Tensor o = paged_attention(
      q, k, v, offsets, num_candidates, pages, page_indptr, page_ids, cached_lengths, alpha, scaling_seqlen);
  return norm_mul_linear_residual(
      o.flatten(1), part(0), output_norm_weight, output_norm_bias, eps, packed_output, x);
}
#endif

}  // namespace hstu

TORCH_LIBRARY(hstu_native, library) {
  library.def(
      "attention(Tensor q, Tensor k, Tensor v, int[] offsets, int[] num_candidates, Tensor? pages, int[] page_indptr, "
      "int[] page_ids, int[] cached_lengths, float alpha, int scaling_seqlen) -> Tensor");
  library.def("append(Tensor k, Tensor v, Tensor rows, Tensor(a!) pages, Tensor slots) -> ()");
  library.def("layer_norm(Tensor x, Tensor? u, Tensor weight, Tensor bias, float eps) -> Tensor");
  library.def("has_bf16_tiles() -> bool", &hstu::has_bf16_tiles);
  library.def("bf16_tile_units() -> str", &hstu::bf16_tile_units);
#ifdef HSTU_BF16_TILES
  library.def("pack_weight(Tensor weight) -> Tensor");
  library.def("linear_silu(Tensor x, Tensor packed, Tensor bias, int num_parts) -> Tensor");
  library.def("linear_residual(Tensor x, Tensor packed, Tensor residual) -> Tensor");
  library.def(
      "norm_linear_silu(Tensor x, Tensor norm_weight, Tensor norm_bias, float eps, Tensor packed, Tensor bias, "
      "int num_parts) -> Tensor");
  library.def(
      "norm_mul_linear_residual(Tensor x, Tensor u, Tensor norm_weight, Tensor norm_bias, float eps, Tensor packed, "
      "Tensor residual) -> Tensor");
  library.def(
      "layer(Tensor x, Tensor input_norm_weight, Tensor input_norm_bias, Tensor packed_uvqk, Tensor uvqk_bias, "
      "Tensor output_norm_weight, Tensor output_norm_bias, Tensor packed_output, float eps, int num_heads, "
      "int[] offsets, int[] num_candidates, Tensor(a!)? pages, Tensor? new_rows, Tensor? new_slots, int[] page_indptr, "
      "int[] page_ids, int[] cached_lengths, float alpha, int scaling_seqlen) -> Tensor");
  library.def("multiply_tiles(int repeats) -> int", &hstu::multiply_tiles);
#endif
}

TORCH_LIBRARY_IMPL(hstu_native, CPU, library) {
  library.impl("attention", &hstu::paged_attention);
  library.impl("append", &hstu::append);
  library.impl("layer_norm", &hstu::norm);
#ifdef HSTU_BF16_TILES
  library.impl("pack_weight", &hstu::pack_weight);
  library.impl("linear_silu", &hstu::linear_silu);
  library.impl("linear_residual", &hstu::linear_residual);
  library.impl("norm_linear_silu", &hstu::norm_linear_silu);
  library.impl("norm_mul_linear_residual", &hstu::norm_mul_linear_residual);
  library.impl("layer", &hstu::layer);
#endif
}
