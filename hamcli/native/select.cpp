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
#include <limits>
#include <mutex>
#include <optional>
#include <type_traits>
#include <vector>

namespace {

using at::Tensor;

constexpr int DIGIT_BITS = 16;
constexpr int64_t DIGITS = int64_t{1} << DIGIT_BITS;
constexpr int64_t GROUP = 32;  // scores that are looked at together; most groups hold no match
constexpr int64_t PART = 1 << 18;  // scores of one tensor that one thread takes at a time

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

// Some scores of one tensor.
struct Part {
  int64_t tensor;
  int64_t begin;
  int64_t end;
};

std::vector<Part> cut(at::TensorList scores) {
  std::vector<Part> parts;
  for (size_t i = 0; i < scores.size(); ++i) {
    TORCH_CHECK(scores[i].is_contiguous() && scores[i].scalar_type() == scores[0].scalar_type(),
                "scores are not flat in memory, or of several dtypes");
    for (int64_t begin = 0; begin < scores[i].numel(); begin += PART) {
      parts.push_back({static_cast<int64_t>(i), begin, std::min(begin + PART, scores[i].numel())});
    }
  }
  return parts;
}

template <typename key_t>
const key_t* bits_of(const Tensor& scores) {
  return static_cast<const key_t*>(scores.const_data_ptr());
}

template <typename key_t, bool magnitude>
void count_first(const key_t* bits, int64_t numel, int shift, int64_t* found) {
  for (int64_t i = 0; i < numel; ++i) {
    ++found[(key_of<key_t, magnitude>(bits[i]) >> shift) + DIGITS / 2];
  }
}

template <typename key_t, bool magnitude>
void count_inside(const key_t* bits, int64_t numel, int shift, key_t prefix, int64_t* found) {
  const int prefix_shift = shift + DIGIT_BITS;
  for (int64_t i = 0; i < numel; i += GROUP) {
    const int64_t size = std::min(GROUP, numel - i);
    int matches = size < GROUP;
    if (size == GROUP) {
      for (int64_t j = 0; j < GROUP; ++j) {
        matches |= (key_of<key_t, magnitude>(bits[i + j]) >> prefix_shift) == prefix;
      }
    }
    for (int64_t j = 0; matches && j < size; ++j) {
      const key_t key = key_of<key_t, magnitude>(bits[i + j]);
      if ((key >> prefix_shift) == prefix) {
        ++found[(key >> shift) & (DIGITS - 1)];
      }
    }
  }
}

template <typename key_t, bool magnitude>
void count_into(at::TensorList scores, int shift, std::optional<int64_t> begins, int64_t* counts) {
  const auto parts = cut(scores);
  std::mutex adding;
  at::parallel_for(0, static_cast<int64_t>(parts.size()), 1, [&](int64_t first, int64_t last) {
    std::vector<int64_t> found(DIGITS);
    for (int64_t at = first; at < last; ++at) {
      const Part& part = parts[at];
      const key_t* bits = bits_of<key_t>(scores[part.tensor]) + part.begin;
      const int64_t numel = part.end - part.begin;
      if (begins) {
        const auto prefix = static_cast<key_t>(*begins);
        count_inside<key_t, magnitude>(bits, numel, shift, prefix, found.data());
      } else {
        count_first<key_t, magnitude>(bits, numel, shift, found.data());
      }
    }
    const std::lock_guard<std::mutex> guard(adding);
    for (int64_t digit = 0; digit < DIGITS; ++digit) {
      counts[digit] += found[digit];
    }
  });
}

template <typename key_t, bool magnitude>
void count_against(at::TensorList scores, key_t limit, int64_t* counts) {
  const auto parts = cut(scores);
  std::mutex adding;
  at::parallel_for(0, static_cast<int64_t>(parts.size()), 1, [&](int64_t first, int64_t last) {
    for (int64_t at = first; at < last; ++at) {
      const Part& part = parts[at];
      const key_t* bits = bits_of<key_t>(scores[part.tensor]);
      int32_t below = 0, equal = 0;  // of at most PART scores
      for (int64_t i = part.begin; i < part.end; ++i) {
        const key_t key = key_of<key_t, magnitude>(bits[i]);
        below += key < limit;
        equal += key == limit;
      }
      const std::lock_guard<std::mutex> guard(adding);
      counts[2 * part.tensor] += below;
      counts[2 * part.tensor + 1] += equal;
    }
  });
}

// Calls f(an integer of the scores' size, std::bool_constant<magnitude>).
template <typename function_t>
void as_integers(at::TensorList scores, bool magnitude, const function_t& f) {
  if (scores.empty()) {
    return;
  }
  const auto dtype = scores[0].scalar_type();
  TORCH_CHECK(dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf,
              "scores are fp32, bf16 or fp16");
  if (dtype == at::kFloat) {
    magnitude ? f(int32_t{}, std::true_type{}) : f(int32_t{}, std::false_type{});
  } else {
    magnitude ? f(int16_t{}, std::true_type{}) : f(int16_t{}, std::false_type{});
  }
}

Tensor count_digits(at::TensorList scores, int64_t shift, std::optional<int64_t> begins,
                    bool magnitude) {
  Tensor counts = at::zeros({DIGITS}, at::kLong);
  int64_t* out = counts.mutable_data_ptr<int64_t>();
  as_integers(scores, magnitude, [&](auto key, auto is_magnitude) {
    count_into<decltype(key), decltype(is_magnitude)::value>(
        scores, static_cast<int>(shift), begins, out);
  });
  return counts;
}

Tensor count_scores(at::TensorList scores, int64_t limit, bool magnitude) {
  Tensor counts = at::zeros({static_cast<int64_t>(scores.size()), 2}, at::kLong);
  int64_t* out = counts.mutable_data_ptr<int64_t>();
  as_integers(scores, magnitude, [&](auto key, auto is_magnitude) {
    count_against<decltype(key), decltype(is_magnitude)::value>(
        scores, static_cast<decltype(key)>(limit), out);
  });
  return counts;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(ham_native, library) {
  library.def("count_digits(Tensor[] scores, int shift, int? begins, bool magnitude) -> Tensor");
  library.def("count_scores(Tensor[] scores, int limit, bool magnitude) -> Tensor");
}

TORCH_LIBRARY_IMPL(ham_native, CPU, library) {
  library.impl("count_digits", count_digits);
  library.impl("count_scores", count_scores);
}
