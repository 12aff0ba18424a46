// Exact selection: how often each 16-bit digit of the scores' keys occurs, and the masks of a cut.
//
// The key of a score is an integer whose order is the order of the scores: its bits, with those
// below the sign turned over for negative ones. Where a mask drops the score, its key is one that
// the caller gives; where it spares the score, the greatest. Keys are never stored: each pass
// streams over the scores once. Counts are 64-bit sums, and so add up over tensors, shards and
// processes.

#include <ATen/Parallel.h>
#include <ATen/core/List.h>
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
using OptionalTensors = c10::List<std::optional<Tensor>>;

constexpr int DIGIT_BITS = 16;
constexpr int64_t DIGITS = int64_t{1} << DIGIT_BITS;
constexpr int64_t GROUP = 32;  // scores that are looked at together; most groups hold no match
constexpr int64_t BLOCK = 512;  // keys that are made together where masks hold
constexpr int64_t PART = 1 << 18;  // scores of one tensor that one thread takes at a time
constexpr int64_t TABLES = 4;  // of counts, in turn: equal neighbours would wait for each other
constexpr int64_t MOST_THREADS = 16;  // each has tables of 2 MiB

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

// What masks say of each score: nothing; kept or not; dropped, kept or spared, as 0, 1, 2.
enum class Limits { none, mask, places };

// Some scores of one tensor.
struct Part {
  int64_t tensor;
  int64_t begin;
  int64_t end;

  int64_t numel() const {
    return end - begin;
  }
};

// What comes from Python: the caller has seen to shapes, to dtypes and to flat memory.
struct Scores {
  at::TensorList values;
  const OptionalTensors& masks;  // as `Limits`; all or none are there
  int64_t dropped;  // key where a mask drops

  Limits limits() const {
    if (values.size() == 0 || !masks.get(0)) {
      return Limits::none;
    }
    return masks.get(0)->scalar_type() == at::kBool ? Limits::mask : Limits::places;
  }
};

std::vector<Part> cut(const Scores& scores) {
  std::vector<Part> parts;
  for (size_t i = 0; i < scores.values.size(); ++i) {
    const Tensor& values = scores.values[i];
    TORCH_CHECK(values.is_contiguous() && values.scalar_type() == scores.values[0].scalar_type(),
                "scores are not flat in memory, or of several dtypes");
    const std::optional<Tensor> mask = scores.masks.get(i);
    TORCH_CHECK(mask.has_value() == (scores.limits() != Limits::none),
                "some scores have masks, others have none");
    const auto kind = scores.limits() == Limits::places ? at::kByte : at::kBool;
    TORCH_CHECK(!mask || (mask->is_contiguous() && mask->scalar_type() == kind &&
                          mask->numel() == values.numel()),
                "a mask is not flat in memory, not of the dtype of the first, or of another size");
    for (int64_t begin = 0; begin < values.numel(); begin += PART) {
      parts.push_back({static_cast<int64_t>(i), begin, std::min(begin + PART, values.numel())});
    }
  }
  return parts;
}

// The keys of a part, made when asked for.
template <typename key_t, bool magnitude, Limits limits>
struct Keys {
  const key_t* bits;
  const uint8_t* kept;
  key_t dropped;

  Keys(const Scores& scores, const Part& part)
      : bits(static_cast<const key_t*>(scores.values[part.tensor].const_data_ptr()) + part.begin),
        kept(nullptr),
        dropped(static_cast<key_t>(scores.dropped)) {
    if (limits != Limits::none) {
      const void* start = scores.masks.get(part.tensor)->const_data_ptr();
      kept = static_cast<const uint8_t*>(start) + part.begin;
    }
  }

  // As if there were no masks.
  C10_ALWAYS_INLINE key_t of_value(int64_t i) const {
    return key_of<key_t, magnitude>(bits[i]);
  }

  // Whether keys that masks give may begin so.
  bool masks_give(int prefix_shift, key_t prefix) const {
    return limits != Limits::none &&
        ((dropped >> prefix_shift) == prefix ||
         (limits == Limits::places &&
          (std::numeric_limits<key_t>::max() >> prefix_shift) == prefix));
  }

  C10_ALWAYS_INLINE key_t operator[](int64_t i) const {
    const key_t key = of_value(i);
    if (limits == Limits::none) {
      return key;
    }
    // all bits or none: a choice would be a branch, taken at random
    const auto keeps = static_cast<key_t>(-static_cast<key_t>(kept[i] & 1));
    key_t other = dropped;
    if (limits == Limits::places) {
      const auto spares = static_cast<key_t>(-static_cast<key_t>(kept[i] >> 1));
      other = (std::numeric_limits<key_t>::max() & spares) | (dropped & ~spares);
    }
    return static_cast<key_t>((key & keeps) | (other & ~keeps));
  }
};

template <typename key_t, bool magnitude, Limits limits>
void count_first(
    const Keys<key_t, magnitude, limits>& keys, int64_t numel, int shift, int64_t* found) {
  if (limits == Limits::none) {
    for (int64_t i = 0; i < numel; ++i) {
      ++found[(i % TABLES) * DIGITS + (keys[i] >> shift) + DIGITS / 2];
    }
    return;
  }
  // masks are applied to vectors of keys; one by one they cost as much as the counting
  key_t digits[BLOCK];
  for (int64_t begin = 0; begin < numel; begin += BLOCK) {
    const int64_t size = std::min(BLOCK, numel - begin);
    for (int64_t i = 0; i < size; ++i) {
      digits[i] = static_cast<key_t>(keys[begin + i] >> shift);
    }
    for (int64_t i = 0; i < size; ++i) {
      ++found[(i % TABLES) * DIGITS + digits[i] + DIGITS / 2];
    }
  }
}

template <typename key_t, bool magnitude, Limits limits>
void count_inside(
    const Keys<key_t, magnitude, limits>& keys,
    int64_t numel,
    int shift,
    key_t prefix,
    int64_t* found) {
  const int prefix_shift = shift + DIGIT_BITS;
  const bool masks_give = keys.masks_give(prefix_shift, prefix);
  for (int64_t i = 0; i < numel; i += GROUP) {
    const int64_t size = std::min(GROUP, numel - i);
    int matches = size < GROUP;
    if (size == GROUP) {
      // a mask takes a score out or leaves it in: masks are read only where a value matches
      for (int64_t j = 0; !masks_give && j < GROUP; ++j) {
        matches |= (keys.of_value(i + j) >> prefix_shift) == prefix;
      }
      for (int64_t j = 0; masks_give && j < GROUP; ++j) {
        matches |= (keys[i + j] >> prefix_shift) == prefix;
      }
    }
    for (int64_t j = 0; matches && j < size; ++j) {
      const key_t key = keys[i + j];
      if ((key >> prefix_shift) == prefix) {
        ++found[(j % TABLES) * DIGITS + ((key >> shift) & (DIGITS - 1))];
      }
    }
  }
}

template <typename key_t, bool magnitude, Limits limits>
void count_into(
    const Scores& scores, int shift, std::optional<int64_t> begins, int64_t* counts) {
  const auto parts = cut(scores);
  const auto num_parts = static_cast<int64_t>(parts.size());
  std::mutex adding;
  const int64_t grain = at::divup(num_parts, MOST_THREADS);
  at::parallel_for(0, num_parts, grain, [&](int64_t first, int64_t last) {
    std::vector<int64_t> found(TABLES * DIGITS);
    for (int64_t at = first; at < last; ++at) {
      const Keys<key_t, magnitude, limits> keys(scores, parts[at]);
      if (begins) {
        count_inside(keys, parts[at].numel(), shift, static_cast<key_t>(*begins), found.data());
      } else {
        count_first(keys, parts[at].numel(), shift, found.data());
      }
    }
    const std::lock_guard<std::mutex> guard(adding);
    for (int64_t at = 0; at < TABLES * DIGITS; ++at) {
      counts[at % DIGITS] += found[at];
    }
  });
}

template <typename key_t, bool magnitude, Limits limits>
void count_against(const Scores& scores, key_t limit, int64_t* counts) {
  const auto parts = cut(scores);
  std::mutex adding;
  at::parallel_for(0, static_cast<int64_t>(parts.size()), 1, [&](int64_t first, int64_t last) {
    for (int64_t at = first; at < last; ++at) {
      const Keys<key_t, magnitude, limits> keys(scores, parts[at]);
      int32_t below = 0, equal = 0;  // of at most PART scores
      for (int64_t i = 0; i < parts[at].numel(); ++i) {
        const key_t key = keys[i];
        below += key < limit;
        equal += key == limit;
      }
      const std::lock_guard<std::mutex> guard(adding);
      counts[2 * parts[at].tensor] += below;
      counts[2 * parts[at].tensor + 1] += equal;
    }
  });
}

// Keeps what is above the limit, and of what is at it all but the first `ties`; gives the ties
// that are left over.
template <typename key_t, bool magnitude, Limits limits>
int64_t write_masks(const Scores& scores, key_t limit, int64_t ties, at::TensorList made) {
  const auto parts = cut(scores);
  const auto num_parts = static_cast<int64_t>(parts.size());
  std::vector<int64_t> equals(num_parts);
  const auto out = [&](const Part& part) {
    return made[part.tensor].mutable_data_ptr<bool>() + part.begin;
  };
  at::parallel_for(0, num_parts, 1, [&](int64_t first, int64_t last) {
    for (int64_t at = first; at < last; ++at) {
      const Keys<key_t, magnitude, limits> keys(scores, parts[at]);
      bool* mask = out(parts[at]);
      int32_t equal = 0;
      for (int64_t i = 0; i < parts[at].numel(); ++i) {
        const key_t key = keys[i];
        mask[i] = key >= limit;
        equal += key == limit;
      }
      equals[at] = equal;
    }
  });
  std::vector<int64_t> drops(num_parts);  // of the ties of each part
  for (int64_t at = 0; at < num_parts; ++at) {
    drops[at] = std::min(ties, equals[at]);
    ties -= drops[at];
  }
  at::parallel_for(0, num_parts, 1, [&](int64_t first, int64_t last) {
    for (int64_t at = first; at < last; ++at) {
      const Keys<key_t, magnitude, limits> keys(scores, parts[at]);
      bool* mask = out(parts[at]);
      int64_t left = drops[at];
      for (int64_t i = 0; left > 0; ++i) {
        if (keys[i] == limit) {
          mask[i] = false;
          --left;
        }
      }
    }
  });
  return ties;
}

// Calls f(an integer of the scores' size, std::bool_constant<magnitude>, a constant of Limits).
template <typename function_t>
void as_integers(const Scores& scores, bool magnitude, const function_t& f) {
  if (scores.values.empty()) {
    return;
  }
  const auto dtype = scores.values[0].scalar_type();
  TORCH_CHECK(dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf,
              "scores are fp32, bf16 or fp16");
  const auto with_masks = [&](auto key, auto is_magnitude) {
    switch (scores.limits()) {
      case Limits::none:
        return f(key, is_magnitude, std::integral_constant<Limits, Limits::none>{});
      case Limits::mask:
        return f(key, is_magnitude, std::integral_constant<Limits, Limits::mask>{});
      case Limits::places:
        return f(key, is_magnitude, std::integral_constant<Limits, Limits::places>{});
    }
  };
  if (dtype == at::kFloat) {
    magnitude ? with_masks(int32_t{}, std::true_type{}) : with_masks(int32_t{}, std::false_type{});
  } else {
    magnitude ? with_masks(int16_t{}, std::true_type{}) : with_masks(int16_t{}, std::false_type{});
  }
}

Tensor count_digits(
    at::TensorList values,
    const OptionalTensors& masks,
    int64_t dropped,
    int64_t shift,
    std::optional<int64_t> begins,
    bool magnitude) {
  const Scores scores{values, masks, dropped};
  Tensor counts = at::zeros({DIGITS}, at::kLong);
  int64_t* out = counts.mutable_data_ptr<int64_t>();
  as_integers(scores, magnitude, [&](auto key, auto is_magnitude, auto limits) {
    count_into<decltype(key), decltype(is_magnitude)::value, decltype(limits)::value>(
        scores, static_cast<int>(shift), begins, out);
  });
  return counts;
}

Tensor count_scores(
    at::TensorList values,
    const OptionalTensors& masks,
    int64_t dropped,
    int64_t limit,
    bool magnitude) {
  const Scores scores{values, masks, dropped};
  Tensor counts = at::zeros({static_cast<int64_t>(values.size()), 2}, at::kLong);
  int64_t* out = counts.mutable_data_ptr<int64_t>();
  as_integers(scores, magnitude, [&](auto key, auto is_magnitude, auto limits) {
    using key_t = decltype(key);
    count_against<key_t, decltype(is_magnitude)::value, decltype(limits)::value>(
        scores, static_cast<key_t>(limit), out);
  });
  return counts;
}

int64_t keep_masks(
    at::TensorList values,
    const OptionalTensors& masks,
    int64_t dropped,
    int64_t limit,
    int64_t ties,
    bool magnitude,
    at::TensorList made) {
  const Scores scores{values, masks, dropped};
  for (size_t i = 0; i < values.size(); ++i) {
    TORCH_CHECK(made[i].is_contiguous() && made[i].scalar_type() == at::kBool &&
                    made[i].numel() == values[i].numel(),
                "a mask to be made is not flat in memory, not bool, or of another size");
  }
  as_integers(scores, magnitude, [&](auto key, auto is_magnitude, auto limits) {
    using key_t = decltype(key);
    ties = write_masks<key_t, decltype(is_magnitude)::value, decltype(limits)::value>(
        scores, static_cast<key_t>(limit), ties, made);
  });
  return ties;
}

// Keeps the n greatest of each m neighbours along an axis, whose stride is `inner`; of equal ones
// the last. m is a constant where it is usual, so that the comparisons are laid out in a row.
template <typename key_t, int64_t usual>
void keep_of_groups(
    const key_t* bits, bool* made, int64_t begin, int64_t end, int64_t n, int64_t size,
    int64_t inner) {
  const int64_t m = usual ? usual : size;
  std::vector<key_t> room(usual ? 0 : m);
  key_t few[usual ? usual : 1];
  key_t* keys = usual ? few : room.data();
  for (int64_t group = begin; group < end; ++group) {
    const int64_t start = group / inner * m * inner + group % inner;
    for (int64_t i = 0; i < m; ++i) {
      keys[i] = key_of<key_t, false>(bits[start + i * inner]);
    }
    for (int64_t i = 0; i < m; ++i) {
      int64_t greater = 0;
      for (int64_t j = 0; j < m; ++j) {
        greater += j <= i ? keys[j] > keys[i] : keys[j] >= keys[i];
      }
      made[start + i * inner] = greater < n;
    }
  }
}

template <typename key_t>
void keep_all_groups(
    const Tensor& scores, int64_t n, int64_t m, int64_t inner, const Tensor& made) {
  const auto* bits = static_cast<const key_t*>(scores.const_data_ptr());
  bool* out = made.mutable_data_ptr<bool>();
  at::parallel_for(0, scores.numel() / m, PART / m + 1, [&](int64_t begin, int64_t end) {
    const auto keep = m == 4 ? keep_of_groups<key_t, 4>
        : m == 8             ? keep_of_groups<key_t, 8>
                             : keep_of_groups<key_t, 0>;
    keep(bits, out, begin, end, n, m, inner);
  });
}

void keep_n_of_m(const Tensor& scores, int64_t n, int64_t m, int64_t inner, const Tensor& made) {
  TORCH_CHECK(scores.is_contiguous() && made.is_contiguous() && made.scalar_type() == at::kBool &&
                  made.numel() == scores.numel() && scores.numel() % (m * inner) == 0,
              "scores and their mask are not flat in memory, or not in groups");
  if (scores.scalar_type() == at::kFloat) {
    keep_all_groups<int32_t>(scores, n, m, inner, made);
  } else {
    TORCH_CHECK(scores.scalar_type() == at::kBFloat16 || scores.scalar_type() == at::kHalf,
                "scores are fp32, bf16 or fp16");
    keep_all_groups<int16_t>(scores, n, m, inner, made);
  }
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(ham_native, library) {
  library.def(
      "count_digits(Tensor[] scores, Tensor?[] masks, int dropped, int shift, int? begins, "
      "bool magnitude) -> Tensor");
  library.def(
      "count_scores(Tensor[] scores, Tensor?[] masks, int dropped, int limit, bool magnitude) "
      "-> Tensor");
  library.def(
      "keep_masks(Tensor[] scores, Tensor?[] masks, int dropped, int limit, int ties, "
      "bool magnitude, Tensor(a!)[] made) -> int");
  library.def("keep_n_of_m(Tensor scores, int n, int m, int inner, Tensor(a!) made) -> ()");
}

TORCH_LIBRARY_IMPL(ham_native, CPU, library) {
  library.impl("count_digits", count_digits);
  library.impl("count_scores", count_scores);
  library.impl("keep_masks", keep_masks);
  library.impl("keep_n_of_m", keep_n_of_m);
}
