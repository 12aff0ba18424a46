// A sparse matrix, and its product with a batch: y = x W^T + bias, in fp32.
//
// W [rows, columns] is kept by rows: where each row begins (int32), the columns of what is not zero
// (16 bits, hence at most 65,536 columns) and their values. Six bytes are read for a value, not
// eight. x is turned into panels of a few vectors of batch rows, so that each value of W is spread
// over a vector once and multiplies neighbours in memory; a panel of 64 rows and some hundred
// columns lies in the second cache. A single row of x needs no panel. Vectors come from at::vec,
// threads from at::parallel_for; which thread does what changes no sum.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>
#include <tuple>

namespace {

using at::Tensor;
using Vec = at::vec::Vectorized<float>;

constexpr int64_t LANES = Vec::size();
constexpr int64_t MOST_COLUMNS = int64_t{1} << 16;
constexpr int MOST_VECTORS = 8;  // of a panel: that many sums stay in registers
constexpr int64_t STRIP = 32;  // rows of W that one thread takes at a time
constexpr int64_t GRAIN_WORK = 1 << 15;  // multiplications; below it a second thread does not pay

struct Matrix {
  const int32_t* begins;
  const uint16_t* columns;
  const float* values;
  int64_t num_rows;
  int64_t num_columns;

  int64_t num_values() const {
    return begins[num_rows];
  }
};

// --- one row of x

float dot(const Matrix& w, int64_t row, const float* x) {
  int32_t i = w.begins[row];
  const int32_t end = w.begins[row + 1];
  float sums[4] = {0, 0, 0, 0};  // one sum would wait for itself
  for (; i + 4 <= end; i += 4) {
    for (int j = 0; j < 4; ++j) {
      sums[j] += w.values[i + j] * x[w.columns[i + j]];
    }
  }
  for (; i < end; ++i) {
    sums[0] += w.values[i] * x[w.columns[i]];
  }
  return (sums[0] + sums[1]) + (sums[2] + sums[3]);
}

// --- many rows of x

// Some rows of x, turned: x of column c lies at panel + c * stride.
struct Panel {
  int64_t first;
  int64_t num_rows;
  int64_t stride;  // num_rows rounded up to whole vectors

  int vectors() const {
    return static_cast<int>(stride / LANES);
  }
};

Panel panel_at(int64_t index, int64_t width, int64_t batch) {
  const int64_t first = index * width;
  const int64_t num_rows = std::min(width, batch - first);
  return {first, num_rows, (num_rows + LANES - 1) / LANES * LANES};
}

void turn(const float* x, int64_t num_columns, const Panel& panel, int64_t begin, int64_t end,
          float* turned) {
  int64_t c = begin;
#if defined(CPU_CAPABILITY_AVX2) || defined(CPU_CAPABILITY_AVX512)
  for (; c + LANES <= end; c += LANES) {
    int64_t r = 0;
    for (; r + LANES <= panel.num_rows; r += LANES) {
      at::vec::transpose_mxn<float, LANES, LANES>(
          x + (panel.first + r) * num_columns + c, num_columns,
          turned + c * panel.stride + r, panel.stride);
    }
    for (; r < panel.stride; ++r) {
      const float* from = x + (panel.first + r) * num_columns;
      for (int64_t j = c; j < c + LANES; ++j) {
        turned[j * panel.stride + r] = r < panel.num_rows ? from[j] : 0.0f;
      }
    }
  }
#endif
  for (; c < end; ++c) {
    for (int64_t r = 0; r < panel.stride; ++r) {
      turned[c * panel.stride + r] =
          r < panel.num_rows ? x[(panel.first + r) * num_columns + c] : 0.0f;
    }
  }
}

template <int vectors>
C10_ALWAYS_INLINE void multiply_row(
    const Matrix& w, int64_t row, const float* turned, float start, float* out) {
  constexpr int64_t stride = vectors * LANES;
  Vec sums[vectors];
  for (int v = 0; v < vectors; ++v) {
    sums[v] = Vec(start);
  }
  int32_t i = w.begins[row];
  const int32_t end = w.begins[row + 1];
  if constexpr (vectors <= 4) {  // few sums would wait for themselves: twice as many
    Vec others[vectors];
    for (int v = 0; v < vectors; ++v) {
      others[v] = Vec(0.0f);
    }
    for (; i + 2 <= end; i += 2) {
      const Vec one(w.values[i]), two(w.values[i + 1]);
      const float* from = turned + w.columns[i] * stride;
      const float* next = turned + w.columns[i + 1] * stride;
      for (int v = 0; v < vectors; ++v) {
        sums[v] = at::vec::fmadd(one, Vec::loadu(from + v * LANES), sums[v]);
        others[v] = at::vec::fmadd(two, Vec::loadu(next + v * LANES), others[v]);
      }
    }
    for (int v = 0; v < vectors; ++v) {
      sums[v] = sums[v] + others[v];
    }
  }
  for (; i < end; ++i) {
    const Vec value(w.values[i]);
    const float* from = turned + w.columns[i] * stride;
    for (int v = 0; v < vectors; ++v) {
      sums[v] = at::vec::fmadd(value, Vec::loadu(from + v * LANES), sums[v]);
    }
  }
  for (int v = 0; v < vectors; ++v) {
    sums[v].store(out + v * LANES);
  }
}

// Rows begin .. end of W with one panel; y is turned back a vector's length of rows at a time.
template <int vectors>
void multiply_strip(const Matrix& w, int64_t begin, int64_t end, const Panel& panel,
                    const float* turned, const float* bias, float* y) {
  constexpr int64_t stride = vectors * LANES;
  alignas(64) float found[LANES * stride];
  for (int64_t row = begin; row < end; row += LANES) {
    const int64_t num_rows = std::min(LANES, end - row);
    for (int64_t r = 0; r < num_rows; ++r) {
      multiply_row<vectors>(
          w, row + r, turned, bias == nullptr ? 0.0f : bias[row + r], found + r * stride);
    }
    int64_t b = 0;
#if defined(CPU_CAPABILITY_AVX2) || defined(CPU_CAPABILITY_AVX512)
    if (num_rows == LANES) {
      for (; b + LANES <= panel.num_rows; b += LANES) {
        at::vec::transpose_mxn<float, LANES, LANES>(
            found + b, stride, y + (panel.first + b) * w.num_rows + row, w.num_rows);
      }
    }
#endif
    for (; b < panel.num_rows; ++b) {
      float* to = y + (panel.first + b) * w.num_rows + row;
      for (int64_t r = 0; r < num_rows; ++r) {
        to[r] = found[r * stride + b];
      }
    }
  }
}

template <int vectors = MOST_VECTORS>
void multiply_by(const Matrix& w, int64_t begin, int64_t end, const Panel& panel,
                 const float* turned, const float* bias, float* y) {
  if constexpr (vectors > 0) {
    if (panel.vectors() == vectors) {
      multiply_strip<vectors>(w, begin, end, panel, turned, bias, y);
    } else {
      multiply_by<vectors - 1>(w, begin, end, panel, turned, bias, y);
    }
  }
}

void multiply_one(const Matrix& w, const float* x, const float* bias, float* y) {
  const int64_t work = std::max<int64_t>(1, w.num_values() / std::max<int64_t>(1, w.num_rows));
  at::parallel_for(0, w.num_rows, std::max<int64_t>(1, GRAIN_WORK / work),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t row = begin; row < end; ++row) {
                       y[row] = dot(w, row, x) + (bias == nullptr ? 0.0f : bias[row]);
                     }
                   });
}

void multiply_many(const Matrix& w, const float* x, int64_t batch, const float* bias, float* y,
                   int64_t width) {
  const int64_t num_panels = (batch + width - 1) / width;
  const int64_t strips = (w.num_rows + STRIP - 1) / STRIP;
  const int64_t panel_size = width * w.num_columns;
  const Tensor space = at::empty({num_panels * panel_size}, at::kFloat);
  float* turned = space.mutable_data_ptr<float>();
  const int64_t blocks = (w.num_columns + LANES - 1) / LANES;
  at::parallel_for(0, num_panels * blocks, std::max<int64_t>(1, GRAIN_WORK / (width * LANES)),
                   [&](int64_t begin, int64_t end) {
                     while (begin < end) {
                       const int64_t index = begin / blocks;
                       const int64_t stop = std::min(end, (index + 1) * blocks);
                       turn(x, w.num_columns, panel_at(index, width, batch),
                            (begin - index * blocks) * LANES,
                            std::min(w.num_columns, (stop - index * blocks) * LANES),
                            turned + index * panel_size);
                       begin = stop;
                     }
                   });
  const int64_t work = std::max<int64_t>(1, w.num_values() * width / std::max<int64_t>(1, strips));
  at::parallel_for(0, num_panels * strips, std::max<int64_t>(1, GRAIN_WORK / work),
                   [&](int64_t begin, int64_t end) {
                     for (int64_t i = begin; i < end; ++i) {
                       const int64_t index = i / strips, row = (i % strips) * STRIP;
                       multiply_by(w, row, std::min(w.num_rows, row + STRIP),
                                   panel_at(index, width, batch), turned + index * panel_size,
                                   bias, y);
                     }
                   });
}

// --- what Python calls

bool is_zero(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits == 0;  // -0.0 is kept: nothing of W is lost
}

std::tuple<Tensor, Tensor, Tensor> csr_pack(const Tensor& dense) {
  TORCH_CHECK(dense.dim() == 2 && dense.scalar_type() == at::kFloat && dense.is_contiguous(),
              "the matrix is not of two dimensions, not fp32, or not flat in memory");
  const int64_t num_rows = dense.size(0), num_columns = dense.size(1);
  TORCH_CHECK(num_columns <= MOST_COLUMNS, "more columns than 16 bits can name");
  const float* from = dense.const_data_ptr<float>();
  Tensor begins = at::empty({num_rows + 1}, at::kInt);
  int32_t* starts = begins.mutable_data_ptr<int32_t>();
  int64_t total = 0;
  for (int64_t row = 0; row < num_rows; ++row) {
    starts[row] = static_cast<int32_t>(total);
    for (int64_t c = 0; c < num_columns; ++c) {
      total += !is_zero(from[row * num_columns + c]);
    }
    TORCH_CHECK(total <= std::numeric_limits<int32_t>::max(), "more values than 31 bits can count");
  }
  starts[num_rows] = static_cast<int32_t>(total);
  Tensor columns = at::empty({total}, at::kShort);
  Tensor values = at::empty({total}, at::kFloat);
  auto* places = reinterpret_cast<uint16_t*>(columns.mutable_data_ptr<int16_t>());
  float* kept = values.mutable_data_ptr<float>();
  int64_t i = 0;
  for (int64_t row = 0; row < num_rows; ++row) {
    for (int64_t c = 0; c < num_columns; ++c) {
      const float value = from[row * num_columns + c];
      if (!is_zero(value)) {
        places[i] = static_cast<uint16_t>(c);
        kept[i++] = value;
      }
    }
  }
  return {begins, columns, values};
}

Tensor csr_linear(const Tensor& x, const Tensor& begins, const Tensor& columns,
                  const Tensor& values, const std::optional<Tensor>& bias, int64_t vectors) {
  TORCH_CHECK(x.dim() == 2 && x.is_contiguous() && x.scalar_type() == at::kFloat,
              "x is not of two dimensions, not fp32, or not flat in memory");
  TORCH_CHECK(begins.scalar_type() == at::kInt && columns.scalar_type() == at::kShort &&
                  values.scalar_type() == at::kFloat && begins.is_contiguous() &&
                  columns.is_contiguous() && values.is_contiguous() && begins.numel() > 0,
              "the matrix is not as csr_pack makes it");
  const Matrix w{begins.const_data_ptr<int32_t>(),
                 reinterpret_cast<const uint16_t*>(columns.const_data_ptr<int16_t>()),
                 values.const_data_ptr<float>(), begins.numel() - 1, x.size(1)};
  TORCH_CHECK(w.num_values() == values.numel() && values.numel() == columns.numel(),
              "the matrix is not as csr_pack makes it");
  TORCH_CHECK(!bias || (bias->is_contiguous() && bias->scalar_type() == at::kFloat &&
                        bias->numel() == w.num_rows),
              "the bias is not fp32, not flat in memory, or of another length");
  TORCH_CHECK(vectors >= 1 && vectors <= MOST_VECTORS, "a panel has 1 to 8 vectors");
  const int64_t batch = x.size(0);
  Tensor y = at::empty({batch, w.num_rows}, at::kFloat);
  if (y.numel() == 0) {
    return y;
  }
  const float* start = bias ? bias->const_data_ptr<float>() : nullptr;
  if (batch == 1) {
    multiply_one(w, x.const_data_ptr<float>(), start, y.mutable_data_ptr<float>());
  } else {
    multiply_many(w, x.const_data_ptr<float>(), batch, start, y.mutable_data_ptr<float>(),
                  vectors * LANES);
  }
  return y;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(ham_native, library) {
  library.def("csr_pack(Tensor dense) -> (Tensor, Tensor, Tensor)");
  library.def(
      "csr_linear(Tensor x, Tensor begins, Tensor columns, Tensor values, Tensor? bias, "
      "int vectors) -> Tensor");
}

TORCH_LIBRARY_IMPL(ham_native, CPU, library) {
  library.impl("csr_pack", csr_pack);
  library.impl("csr_linear", csr_linear);
}
