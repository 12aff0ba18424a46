// Counts for exact selection: how often each 16-bit digit of the scores' keys occurs.
//
// The key of a score is an integer whose order is the order of the scores: its bits, with those
// below the sign turned over for negative ones. Keys are never stored: each pass streams over the
// scores once. Counts are 64-bit sums, and so add up over tensors, shards and processes.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <mutex>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

namespace {

using at::Tensor;

constexpr int DIGIT_BITS = 16;
constexpr int64_t DIGITS = int64_t{1} << DIGIT_BITS;
constexpr int64_t GROUP = 32;  // scores that are looked at together; most groups hold no match
constexpr int64_t GRAIN = 1 << 18;  // below it a second table of counts does not pay
constexpr int64_t MOST_IN_32_BITS = std::numeric_limits<uint32_t>::max();

template <typename key_t, bool magnitude>
inline key_t key_of(key_t bits) {
  constexpr key_t sign = std::numeric_limits<key_t>::min();
  constexpr key_t rest = std::numeric_limits<key_t>::max();
  if (magnitude) {
    return bits & rest;
  }
  const key_t turned = bits ^ ((bits >> (std::numeric_limits<key_t>::digits)) & rest);
  return bits == sign ? key_t{0} : turned;  // -0.0 equals 0.0
}

// Calls f(first, last) on parts of the scores, on many threads.
template <typename function_t>
void in_parts(int64_t numel, const function_t& f) {
  at::parallel_for(0, numel, GRAIN, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; at += MOST_IN_32_BITS) {
      f(at, std::min(end, at + MOST_IN_32_BITS));
    }
  });
}

template <typename key_t, bool magnitude>
void count_into(const key_t* bits, int64_t numel, int shift, std::optional<int64_t> begins,
                int64_t* counts) {
  std::mutex adding;
  in_parts(numel, [&](int64_t first, int64_t last) {
    std::vector<uint32_t> found(DIGITS);
    if (!begins) {
      for (int64_t i = first; i < last; ++i) {
        ++found[(key_of<key_t, magnitude>(bits[i]) >> shift) + DIGITS / 2];
      }
    } else {
      const int prefix_shift = shift + DIGIT_BITS;
      const auto prefix = static_cast<key_t>(*begins);
      for (int64_t i = first; i < last; i += GROUP) {
        const int64_t size = std::min(GROUP, last - i);
        int matches = 0;
        if (size == GROUP) {
          for (int64_t j = 0; j < GROUP; ++j) {
            matches |= (key_of<key_t, magnitude>(bits[i + j]) >> prefix_shift) == prefix;
          }
        }
        if (size < GROUP || matches) {
          for (int64_t j = 0; j < size; ++j) {
            const key_t key = key_of<key_t, magnitude>(bits[i + j]);
            if ((key >> prefix_shift) == prefix) {
              ++found[(key >> shift) & (DIGITS - 1)];
            }
          }
        }
      }
    }
    const std::lock_guard<std::mutex> guard(adding);
    for (int64_t digit = 0; digit < DIGITS; ++digit) {
      counts[digit] += found[digit];
    }
  });
}

template <typename key_t, bool magnitude>
std::tuple<int64_t, int64_t> count_against(const key_t* bits, int64_t numel, int64_t key) {
  std::mutex adding;
  int64_t below = 0, at = 0;
  const auto limit = static_cast<key_t>(key);
  in_parts(numel, [&](int64_t first, int64_t last) {
    int64_t less = 0, equal = 0;
    for (int64_t begin = first; begin < last; begin += 4096) {
      const int64_t end = std::min(last, begin + 4096);
      int32_t block_less = 0, block_equal = 0;
      for (int64_t i = begin; i < end; ++i) {
        const key_t own = key_of<key_t, magnitude>(bits[i]);
        block_less += own < limit;
        block_equal += own == limit;
      }
      less += block_less;
      equal += block_equal;
    }
    const std::lock_guard<std::mutex> guard(adding);
    below += less;
    at += equal;
  });
  return {below, at};
}

// Calls f(bits, std::bool_constant<magnitude>) with the scores as integers of their size.
template <typename function_t>
auto with_bits(const Tensor& scores, bool magnitude, const function_t& f) {
  TORCH_CHECK(scores.is_contiguous() && scores.device().is_cpu(), "scores are not flat on a CPU");
  const auto dtype = scores.scalar_type();
  TORCH_CHECK(dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf,
              "scores are fp32, bf16 or fp16");
  const void* data = scores.const_data_ptr();
  if (dtype == at::kFloat) {
    const auto* bits = static_cast<const int32_t*>(data);
    return magnitude ? f(bits, std::true_type{}) : f(bits, std::false_type{});
  }
  const auto* bits = static_cast<const int16_t*>(data);
  return magnitude ? f(bits, std::true_type{}) : f(bits, std::false_type{});
}

Tensor count_digits(const Tensor& scores, int64_t shift, std::optional<int64_t> begins,
                    bool magnitude) {
  Tensor counts = at::zeros({DIGITS}, at::kLong);
  int64_t* out = counts.mutable_data_ptr<int64_t>();
  with_bits(scores, magnitude, [&](const auto* bits, auto is_magnitude) {
    using key_t = std::remove_cv_t<std::remove_pointer_t<decltype(bits)>>;
    count_into<key_t, decltype(is_magnitude)::value>(
        bits, scores.numel(), static_cast<int>(shift), begins, out);
  });
  return counts;
}

std::tuple<int64_t, int64_t> count_scores(const Tensor& scores, int64_t key, bool magnitude) {
  return with_bits(scores, magnitude, [&](const auto* bits, auto is_magnitude) {
    using key_t = std::remove_cv_t<std::remove_pointer_t<decltype(bits)>>;
    return count_against<key_t, decltype(is_magnitude)::value>(bits, scores.numel(), key);
  });
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(ham_native, library) {
  library.def("count_digits(Tensor scores, int shift, int? begins, bool magnitude) -> Tensor");
  library.def("count_scores(Tensor scores, int key, bool magnitude) -> (int, int)");
}

TORCH_LIBRARY_IMPL(ham_native, CPU, library) {
  library.impl("count_digits", count_digits);
  library.impl("count_scores", count_scores);
}
