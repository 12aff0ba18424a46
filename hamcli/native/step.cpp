// One pass over the weights: base step, mirror step, mask, as `hamcli.optim.rule` defines them.
//
// Every tensor is read once and written once, with no memory of its own. The lanes of a vector,
// and so AVX2, AVX-512 or NEON, come from at::vec; the threads from at::parallel_for. The base
// steps repeat torch's fused CPU kernels operation by operation, and so agree with them in bits;
// hence the file is compiled without contraction, and each fused multiply-add is written out.
//
// Legend: w weights (fp32), g gradients, m and v first and second moments, a = lr * alpha,
// b = lr * beta, e exponents.

#include <ATen/Parallel.h>
#include <ATen/core/List.h>
#include <ATen/core/Tensor.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>
#include <type_traits>
#include <vector>

namespace {

using at::BFloat16;
using at::Half;
using at::Tensor;
using Vec = at::vec::Vectorized<float>;
using Bits = at::vec::Vectorized<int32_t>;
using OptionalTensors = c10::List<std::optional<Tensor>>;

constexpr int64_t LANES = Vec::size();
// torch has its fused steps for AVX2 alone, also where the CPU has AVX-512
constexpr int64_t TORCH_LANES = LANES < 8 ? LANES : 8;
constexpr int64_t BLOCK = 1 << 13;  // weights; a multiple of any number of lanes
constexpr int64_t GRAIN = 4;  // blocks; below it a second thread does not pay
constexpr int NUM_SUMS = 5;  // as in hamcli.optim.cpu

// --- the mirror step

// exp(e) - 1 = e + e^2 P(e). Minimax coefficients in fp32; the greatest error of the sum is
// 2.8e-10 for |e| <= 1/8 and 1.2e-9 for |e| <= ln(2)/2: 0.005 and 0.03 of the last digit of 1.
constexpr float SMALL = 0.125f;
constexpr float SMALL_P[] = {0x1.fffff6p-2f, 0x1.555550p-3f, 0x1.559498p-5f, 0x1.113e1ap-7f};
constexpr float P[] = {0x1.000000p-1f, 0x1.555556p-3f, 0x1.555480p-5f,
                       0x1.11107cp-7f, 0x1.6d96b8p-10f, 0x1.a1b83ep-13f};
constexpr float SHIFT = 0x1.8p+23f;
constexpr int32_t BITS_OF_1 = 0x3f800000;
constexpr float LOG2_E = 0x1.715476p+0f;
constexpr float LN2_HIGH = 0x1.62e430p-1f;  // ln 2 to the nearest fp32, and what is left of it
constexpr float LN2_LOW = -0x1.05c610p-29f;
constexpr float CLAMP_LIMIT = 87.0f;  // exp of it, and of minus it, is a normal fp32 number

template <int n>
C10_ALWAYS_INLINE Vec polynomial(Vec x, const float (&coefficients)[n]) {
  Vec sum(coefficients[n - 1]);
  for (int i = n - 2; i >= 0; --i) {
    sum = at::vec::fmadd(sum, x, Vec(coefficients[i]));
  }
  return sum;
}

C10_ALWAYS_INLINE Vec times_exp_small(Vec w, Vec e) {
  const Vec growth = at::vec::fmadd(e * e, polynomial(e, SMALL_P), e);
  return at::vec::fmadd(w, growth, w);
}

// w * 2^k * (1 + (exp(r) - 1)), e = k ln 2 + r: rounded once, and no digit cancels. A number as
// large as SHIFT has no digits after the point, so that adding it rounds, and k stands in the last
// bits of the sum.
C10_ALWAYS_INLINE Vec times_exp(Vec w, Vec e) {
  const Vec shifted = at::vec::fmadd(e, Vec(LOG2_E), Vec(SHIFT));
  const Vec k = shifted - Vec(SHIFT);
  Vec r = at::vec::fmadd(k, Vec(-LN2_HIGH), e);
  r = at::vec::fmadd(k, Vec(-LN2_LOW), r);
  const Vec growth = at::vec::fmadd(r * r, polynomial(r, P), r);
  const Bits power = (at::vec::cast<int32_t, float>(shifted) << Bits(23)) + Bits(BITS_OF_1);
  const Vec scaled = w * at::vec::cast<float, int32_t>(power);
  return at::vec::fmadd(scaled, growth, scaled);
}

struct Mirror {
  float a;
  float b;
  float clamp;

  bool is_on() const {
    return a != 0 || b != 0;
  }
};

// What a measured step adds up, over the weights that are kept and not zero.
struct Sums {
  Vec size{0.0f}, moved{0.0f}, clamped{0.0f}, count{0.0f}, greatest{0.0f};

  C10_ALWAYS_INLINE void add(Vec before, Vec after, Vec e, Vec kept, float clamp) {
    const Vec one(1.0f);
    const Vec counted = (before != Vec(0.0f)) & kept;
    const Vec magnitude = e.abs() & counted;
    size = size + magnitude;
    moved = moved + ((before != after) & counted & one);
    clamped = clamped + ((magnitude >= Vec(clamp)) & one);
    count = count + (counted & one);
    greatest = at::vec::maximum(greatest, magnitude);
  }

  static double total(Vec x) {
    float lanes[LANES];
    x.store(lanes);
    double sum = 0;
    for (float lane : lanes) {
      sum += lane;
    }
    return sum;
  }

  void write(double* out) const {
    out[0] = total(size);
    out[1] = total(moved);
    out[2] = total(clamped);
    out[3] = total(count);
    float lanes[LANES];
    greatest.store(lanes);
    out[4] = 0;
    for (float lane : lanes) {
      out[4] = std::isnan(lane) ? lane : std::max<double>(out[4], lane);
    }
  }
};

// How a block is done: fixed when it is compiled, so that the loop has no branch to take.
enum class Kind {
  off,
  off_masked,
  small,
  small_masked,
  small_measured,
  any,
  any_masked,
  any_measured
};

// A vector with small exponents alone would gain less by the short form than the look for it costs.
constexpr bool is_small(Kind kind) {
  return kind == Kind::small || kind == Kind::small_masked || kind == Kind::small_measured;
}

constexpr bool is_measured(Kind kind) {
  return kind == Kind::small_measured || kind == Kind::any_measured;
}

constexpr bool is_masked(Kind kind) {
  return kind != Kind::off && kind != Kind::small && kind != Kind::any;
}

constexpr bool mirrors(Kind kind) {
  return kind != Kind::off && kind != Kind::off_masked;
}

template <Kind kind>
C10_ALWAYS_INLINE Vec mirrored(Vec w, Vec g, Vec kept, const Mirror& by, Sums& sums) {
  const Vec sign = w & Vec(-0.0f);
  Vec e = at::vec::fmadd(g ^ sign, Vec(-by.a), Vec(-by.b));
  e = at::vec::clamp(e, Vec(-by.clamp), Vec(by.clamp));
  const Vec made = is_small(kind) ? times_exp_small(w, e) : times_exp(w, e);
  if constexpr (is_measured(kind)) {
    sums.add(w, made, e, kept, by.clamp);
  }
  return made;
}

// --- the base steps: one vector of weights, and one weight, as torch's fused kernels take them

template <bool decoupled>
struct Adam {
  float lerp;  // 1 - beta1
  float lerp_weight;  // of g - m, from the nearer end: m, or g
  int32_t from_m;  // all bits if that is m, else none
  float beta2;
  float one_minus_beta2;
  float weight_decay;  // coupled: of the weight; decoupled: what is left of the weight
  float step_size;
  float root_correction;
  float eps;

  static constexpr int NUM_MOMENTS = 2;

  C10_ALWAYS_INLINE Vec step(Vec w, Vec g, Vec* moment) const {
    if constexpr (decoupled) {
      w = w * Vec(weight_decay);
    } else {
      g = at::vec::fmadd(w, Vec(weight_decay), g);
    }
    const Vec m = moment[0];
    // a blend, since a choice made here costs a branch for each vector
    const Vec nearer = Vec::blendv(g, m, at::vec::cast<float, int32_t>(Bits(from_m)));
    moment[0] = at::vec::fmadd(g - m, Vec(lerp_weight), nearer);
    moment[1] = at::vec::fmadd(g, g * Vec(one_minus_beta2), moment[1] * Vec(beta2));
    const Vec root = moment[1].sqrt() / Vec(root_correction) + Vec(eps);
    return w + Vec(-step_size) * moment[0] / root;
  }

  float step(float w, float g, float* moment) const {
    if constexpr (decoupled) {
      w = w * weight_decay;
    } else {
      g = std::fma(w, weight_decay, g);
    }
    const float m = moment[0];
    moment[0] =
        std::abs(lerp) < 0.5f ? std::fma(lerp, g - m, m) : std::fma(-(g - m), 1 - lerp, g);
    moment[1] = std::fma(moment[1], beta2, one_minus_beta2 * g * g);
    return w - step_size * moment[0] / (std::sqrt(moment[1]) / root_correction + eps);
  }
};

template <bool has_momentum>
struct Sgd {
  float lr;
  float momentum;
  float weight_decay;
  bool nesterov;
  bool is_first_step;

  static constexpr int NUM_MOMENTS = has_momentum ? 1 : 0;

  template <typename number_t>
  C10_ALWAYS_INLINE number_t step(number_t w, number_t g, number_t* moment) const {
    g = fma(w, number_t(weight_decay), g);
    if constexpr (has_momentum) {
      moment[0] = is_first_step ? g : decayed(moment[0], g);
      g = nesterov ? fma(moment[0], number_t(momentum), g) : moment[0];
    }
    return fma(g, number_t(-lr), w);
  }


  // torch's vectors round the product, its last few weights do not
  Vec decayed(Vec m, Vec g) const {
    return m * Vec(momentum) + g;
  }
  float decayed(float m, float g) const {
    return std::fma(m, momentum, g);
  }
  static Vec fma(Vec x, Vec y, Vec z) {
    return at::vec::fmadd(x, y, z);
  }
  static float fma(float x, float y, float z) {
    return std::fma(x, y, z);
  }
};

// --- memory

C10_ALWAYS_INLINE Vec load_wide(const float* at) {
  return Vec::loadu(at);
}

template <typename low_t>
C10_ALWAYS_INLINE Vec load_wide(const low_t* at) {
  Vec wide;
  at::vec::load_to_float<low_t>(at, wide);
  return wide;
}

template <typename low_t>
C10_ALWAYS_INLINE void store_rounded(Vec x, Vec y, low_t* at, int64_t count) {
  at::vec::convert_from_float<low_t>(x, y).store(at, static_cast<int>(count));
}

// All bits where the mask keeps, none where it drops: and-ing leaves +0.0, even of NaN. Without a
// mask all is kept.
C10_ALWAYS_INLINE Vec load_mask(const bool* at) {
  if (!at) {
    return at::vec::cast<float, int32_t>(Bits(-1));
  }
  int32_t lanes[LANES];
  for (int64_t i = 0; i < LANES; ++i) {
    lanes[i] = -static_cast<int32_t>(at[i]);
  }
  return at::vec::cast<float, int32_t>(Bits::loadu(lanes));
}

template <typename base_t, typename grad_t, typename low_t>
struct Item {
  static constexpr bool IS_LOW = !std::is_void_v<low_t>;
  static constexpr int NUM_MOMENTS = base_t::NUM_MOMENTS;

  base_t base;
  Mirror mirror;
  float* w;
  const grad_t* g;
  float* moments[NUM_MOMENTS + 1];
  const bool* mask;
  low_t* rounded;  // void* where the weights are their own
  int64_t numel;
};

// One vector: everything that happens to LANES weights at `at`.
template <Kind kind, typename item_t>
C10_ALWAYS_INLINE Vec step_vector(const item_t& item, int64_t at, Sums& sums) {
  constexpr int num_moments = item_t::NUM_MOMENTS;
  const Vec g = load_wide(item.g + at);
  Vec moment[num_moments + 1];
  for (int i = 0; i < num_moments; ++i) {
    moment[i] = Vec::loadu(item.moments[i] + at);
  }
  Vec w = item.base.step(Vec::loadu(item.w + at), g, moment);
  const Vec kept = load_mask(is_masked(kind) && item.mask ? item.mask + at : nullptr);
  if constexpr (mirrors(kind)) {
    w = mirrored<kind>(w, g, kept, item.mirror, sums);
  }
  if constexpr (is_masked(kind)) {
    w = w & kept;
    moment[0] = moment[0] & kept;
  }
  w.store(item.w + at);
  for (int i = 0; i < num_moments; ++i) {
    moment[i].store(item.moments[i] + at);
  }
  return w;
}

// Fewer weights than LANES, with the rounding of whole vectors.
template <Kind kind, typename item_t>
void step_padded(const item_t& item, int64_t at, int64_t count, Sums& sums) {
  constexpr int num_moments = item_t::NUM_MOMENTS;
  float w[LANES] = {}, moments[num_moments + 1][LANES] = {};
  std::remove_const_t<std::remove_pointer_t<decltype(item.g)>> g[LANES] = {};
  bool mask[LANES] = {};
  item_t padded = item;
  std::copy_n(item.w + at, count, w);
  std::copy_n(item.g + at, count, g);
  padded.w = w;
  padded.g = g;
  for (int i = 0; i < num_moments; ++i) {
    std::copy_n(item.moments[i] + at, count, moments[i]);
    padded.moments[i] = moments[i];
  }
  if (item.mask) {
    std::copy_n(item.mask + at, count, mask);
    padded.mask = mask;
  }
  const Vec made = step_vector<kind>(padded, 0, sums);
  std::copy_n(w, count, item.w + at);
  for (int i = 0; i < num_moments; ++i) {
    std::copy_n(moments[i], count, item.moments[i] + at);
  }
  if constexpr (item_t::IS_LOW) {
    store_rounded(made, made, item.rounded + at, count);
  }
}

// The last weights of a tensor, fewer than torch's vectors hold: it takes them one by one, and so
// it rounds.
template <Kind kind, typename item_t>
void step_rest(const item_t& item, int64_t at, int64_t count, Sums& sums) {
  constexpr int num_moments = item_t::NUM_MOMENTS;
  float w[LANES] = {}, g[LANES] = {};
  bool mask[LANES] = {};
  for (int64_t lane = 0; lane < count; ++lane) {
    float moment[num_moments + 1];
    for (int i = 0; i < num_moments; ++i) {
      moment[i] = item.moments[i][at + lane];
    }
    g[lane] = static_cast<float>(item.g[at + lane]);
    mask[lane] = !item.mask || item.mask[at + lane];
    w[lane] = item.base.step(item.w[at + lane], g[lane], moment);
    for (int i = 0; i < num_moments; ++i) {
      item.moments[i][at + lane] = i == 0 && !mask[lane] ? 0.0f : moment[i];
    }
  }
  Vec made = Vec::loadu(w);
  const Vec kept = load_mask(mask);
  if constexpr (mirrors(kind)) {
    made = mirrored<kind>(made, Vec::loadu(g), kept, item.mirror, sums);
  }
  made = made & kept;
  made.store(item.w + at, static_cast<int>(count));
  if constexpr (item_t::IS_LOW) {
    store_rounded(made, made, item.rounded + at, count);
  }
}

template <Kind kind, typename item_t>
void step_block(const item_t& shared, int64_t begin, int64_t end, double* out) {
  const item_t item = shared;  // what no store can reach, the compiler keeps in registers
  Sums sums;
  int64_t at = begin;
  for (; at + 2 * LANES <= end; at += 2 * LANES) {
    const Vec first = step_vector<kind>(item, at, sums);
    const Vec second = step_vector<kind>(item, at + LANES, sums);
    if constexpr (item_t::IS_LOW) {
      store_rounded(first, second, item.rounded + at, 2 * LANES);
    }
  }
  if (at + LANES <= end) {
    const Vec made = step_vector<kind>(item, at, sums);
    if constexpr (item_t::IS_LOW) {
      store_rounded(made, made, item.rounded + at, LANES);
    }
    at += LANES;
  }
  if (at + TORCH_LANES <= end) {
    step_padded<kind>(item, at, TORCH_LANES, sums);
    at += TORCH_LANES;
  }
  if (at < end) {
    step_rest<kind>(item, at, end - at, sums);
  }
  if constexpr (is_measured(kind)) {
    sums.write(out);
  }
}

template <typename item_t>
void step_block(Kind kind, const item_t& item, int64_t begin, int64_t end, double* out) {
  switch (kind) {
    case Kind::off:
      return step_block<Kind::off>(item, begin, end, out);
    case Kind::off_masked:
      return step_block<Kind::off_masked>(item, begin, end, out);
    case Kind::small:
      return step_block<Kind::small>(item, begin, end, out);
    case Kind::small_masked:
      return step_block<Kind::small_masked>(item, begin, end, out);
    case Kind::small_measured:
      return step_block<Kind::small_measured>(item, begin, end, out);
    case Kind::any:
      return step_block<Kind::any>(item, begin, end, out);
    case Kind::any_masked:
      return step_block<Kind::any_masked>(item, begin, end, out);
    case Kind::any_measured:
      return step_block<Kind::any_measured>(item, begin, end, out);
  }
}

template <typename item_t>
Kind kind_of(const item_t& item, bool measures) {
  if (!item.mirror.is_on()) {
    return item.mask ? Kind::off_masked : Kind::off;
  }
  const bool is_small = item.mirror.clamp <= SMALL;
  if (measures) {
    return is_small ? Kind::small_measured : Kind::any_measured;
  }
  if (is_small) {
    return item.mask ? Kind::small_masked : Kind::small;
  }
  return item.mask ? Kind::any_masked : Kind::any;
}

// All tensors as one row of blocks, cut among the threads; the sums are added in their order.
template <typename item_t>
void step_all(const std::vector<item_t>& items, const std::optional<Tensor>& sums) {
  std::vector<int64_t> starts{0};
  for (const auto& item : items) {
    starts.push_back(starts.back() + (item.numel + BLOCK - 1) / BLOCK);
  }
  std::vector<double> parts(sums ? starts.back() * NUM_SUMS : 0);
  at::parallel_for(0, starts.back(), GRAIN, [&](int64_t begin, int64_t end) {
    auto next = std::upper_bound(starts.begin(), starts.end(), begin);
    for (int64_t block = begin; block < end; ++block) {
      while (*next <= block) {
        ++next;
      }
      const int64_t index = next - starts.begin() - 1;
      const auto& item = items[index];
      const int64_t from = (block - starts[index]) * BLOCK;
      const int64_t to = std::min(from + BLOCK, item.numel);
      double* out = sums ? parts.data() + block * NUM_SUMS : nullptr;
      step_block(kind_of(item, sums.has_value()), item, from, to, out);
    }
  });
  if (sums) {
    double* total = sums->mutable_data_ptr<double>();
    for (size_t at = 0; at < parts.size(); at += NUM_SUMS) {
      for (int i = 0; i < NUM_SUMS - 1; ++i) {
        total[i] += parts[at + i];
      }
      const double greatest = parts[at + NUM_SUMS - 1];
      total[NUM_SUMS - 1] =
          std::isnan(greatest) ? greatest : std::max(total[NUM_SUMS - 1], greatest);
    }
  }
}

// --- what comes from Python: the caller has seen to shapes and to flat memory

struct Lists {
  at::TensorList params;
  at::TensorList grads;
  const OptionalTensors& masks;
  const OptionalTensors& rounded;
  c10::ArrayRef<double> a;
  double b;
  double clamp;
};

void check(const Tensor& tensor, const Tensor& like, at::ScalarType dtype) {
  TORCH_CHECK(
      tensor.is_contiguous() && tensor.numel() == like.numel() && tensor.scalar_type() == dtype,
      "a tensor is not contiguous, or not of the size or dtype that belongs to its weights");
}

template <typename base_t, typename grad_t, typename low_t, typename make_t>
void step_as(const Lists& lists, make_t make_base, const std::optional<Tensor>& sums) {
  constexpr auto grad_dtype = c10::CppTypeToScalarType<grad_t>::value;
  std::vector<Item<base_t, grad_t, low_t>> items;
  items.reserve(lists.params.size());
  for (size_t i = 0; i < lists.params.size(); ++i) {
    const Tensor& param = lists.params[i];
    check(param, param, at::kFloat);
    check(lists.grads[i], param, grad_dtype);
    Item<base_t, grad_t, low_t> item{};
    item.w = param.mutable_data_ptr<float>();
    item.g = lists.grads[i].template const_data_ptr<grad_t>();
    item.numel = param.numel();
    const float clamp = std::min(static_cast<float>(lists.clamp), CLAMP_LIMIT);
    item.mirror = {static_cast<float>(lists.a[i]), static_cast<float>(lists.b), clamp};
    const std::optional<Tensor> mask = lists.masks[i];
    if (mask) {
      check(*mask, param, at::kBool);
      item.mask = mask->const_data_ptr<bool>();
    }
    if constexpr (!std::is_void_v<low_t>) {
      const std::optional<Tensor> rounded = lists.rounded[i];
      TORCH_CHECK(rounded, "low-precision gradients without low-precision weights");
      check(*rounded, param, grad_dtype);
      item.rounded = rounded->mutable_data_ptr<low_t>();
    }
    make_base(item, i);
    items.push_back(item);
  }
  step_all(items, sums);
}

// All lists of one call have one dtype of gradients; low-precision ones come with weights of theirs.
template <typename base_t, typename make_t>
void step_lists(const Lists& lists, make_t make_base, const std::optional<Tensor>& sums) {
  if (lists.params.empty()) {
    return;
  }
  const auto dtype = lists.grads[0].scalar_type();
  if (dtype == at::kBFloat16) {
    step_as<base_t, BFloat16, BFloat16>(lists, make_base, sums);
  } else if (dtype == at::kHalf) {
    step_as<base_t, Half, Half>(lists, make_base, sums);
  } else {
    step_as<base_t, float, void>(lists, make_base, sums);
  }
}

void adam_ham_(
    at::TensorList params,
    at::TensorList grads,
    at::TensorList exp_avgs,
    at::TensorList exp_avg_sqs,
    at::TensorList steps,
    const OptionalTensors& masks,
    const OptionalTensors& rounded,
    c10::ArrayRef<double> a,
    double b,
    double clamp,
    double lr,
    double beta1,
    double beta2,
    double eps,
    double weight_decay,
    bool decoupled,
    const std::optional<Tensor>& sums) {
  const Lists lists{params, grads, masks, rounded, a, b, clamp};
  auto make_base = [&](auto& item, size_t i) {
    check(exp_avgs[i], params[i], at::kFloat);
    check(exp_avg_sqs[i], params[i], at::kFloat);
    item.moments[0] = exp_avgs[i].mutable_data_ptr<float>();
    item.moments[1] = exp_avg_sqs[i].mutable_data_ptr<float>();
    // in double: 1 - beta2 formed in fp32 is off by 1e-5 of itself
    const auto step = static_cast<double>(*steps[i].const_data_ptr<float>());
    item.base.lerp = static_cast<float>(1 - beta1);
    const bool is_near = std::abs(item.base.lerp) < 0.5f;
    item.base.lerp_weight = is_near ? item.base.lerp : item.base.lerp - 1;
    item.base.from_m = is_near ? -1 : 0;
    item.base.beta2 = static_cast<float>(beta2);
    item.base.one_minus_beta2 = static_cast<float>(1 - beta2);
    item.base.weight_decay = static_cast<float>(decoupled ? 1 - lr * weight_decay : weight_decay);
    item.base.step_size = static_cast<float>(lr / (1 - std::pow(beta1, step)));
    item.base.root_correction = static_cast<float>(std::sqrt(1 - std::pow(beta2, step)));
    item.base.eps = static_cast<float>(eps);
  };
  if (decoupled) {
    step_lists<Adam<true>>(lists, make_base, sums);
  } else {
    step_lists<Adam<false>>(lists, make_base, sums);
  }
}

void sgd_ham_(
    at::TensorList params,
    at::TensorList grads,
    const OptionalTensors& momentum_buffers,
    const OptionalTensors& masks,
    const OptionalTensors& rounded,
    c10::ArrayRef<double> a,
    double b,
    double clamp,
    double lr,
    double momentum,
    bool nesterov,
    double weight_decay,
    bool is_first_step,
    const std::optional<Tensor>& sums) {
  const Lists lists{params, grads, masks, rounded, a, b, clamp};
  auto make_base = [&](auto& item, size_t i) {
    if (momentum != 0) {
      const std::optional<Tensor> buffer = momentum_buffers[i];
      TORCH_CHECK(buffer, "momentum without a buffer");
      check(*buffer, params[i], at::kFloat);
      item.moments[0] = buffer->mutable_data_ptr<float>();
    }
    item.base.lr = static_cast<float>(lr);
    item.base.momentum = static_cast<float>(momentum);
    item.base.weight_decay = static_cast<float>(weight_decay);
    item.base.nesterov = nesterov;
    item.base.is_first_step = is_first_step;
  };
  if (momentum != 0) {
    step_lists<Sgd<true>>(lists, make_base, sums);
  } else {
    step_lists<Sgd<false>>(lists, make_base, sums);
  }
}

// For each tensor: sum of |g|, sum of g^2 and number of entries, over what its mask keeps.
template <typename grad_t>
void add_norms(const grad_t* g, const bool* mask, int64_t begin, int64_t end, double* out) {
  Vec magnitudes(0.0f), squares(0.0f), count(0.0f);
  const auto add = [&](Vec wide, Vec kept) {
    wide = wide & kept;
    magnitudes = magnitudes + wide.abs();
    squares = at::vec::fmadd(wide, wide, squares);
    count = count + (Vec(1.0f) & kept);
  };
  int64_t at = begin;
  for (; at + LANES <= end; at += LANES) {
    add(load_wide(g + at), load_mask(mask ? mask + at : nullptr));
  }
  if (at < end) {
    float rest[LANES] = {};
    bool kept[LANES] = {};
    for (int64_t lane = 0; lane < end - at; ++lane) {
      rest[lane] = static_cast<float>(g[at + lane]);
      kept[lane] = !mask || mask[at + lane];
    }
    add(Vec::loadu(rest), load_mask(kept));
  }
  out[0] = Sums::total(magnitudes);
  out[1] = Sums::total(squares);
  out[2] = Sums::total(count);
}

Tensor kept_norms(at::TensorList grads, const OptionalTensors& masks) {
  Tensor norms = at::zeros({static_cast<int64_t>(grads.size()), 3}, at::kDouble);
  double* out = norms.mutable_data_ptr<double>();
  for (size_t i = 0; i < grads.size(); ++i) {
    const Tensor& grad = grads[i];
    check(grad, grad, grad.scalar_type());
    const std::optional<Tensor> mask = masks[i];
    if (mask) {
      check(*mask, grad, at::kBool);
    }
    const bool* kept = mask ? mask->const_data_ptr<bool>() : nullptr;
    const int64_t blocks = (grad.numel() + BLOCK - 1) / BLOCK;
    std::vector<double> parts(blocks * 3);
    at::parallel_for(0, blocks, GRAIN, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        const int64_t from = block * BLOCK;
        const int64_t to = std::min(from + BLOCK, grad.numel());
        double* part = parts.data() + block * 3;
        if (grad.scalar_type() == at::kBFloat16) {
          add_norms(grad.const_data_ptr<BFloat16>(), kept, from, to, part);
        } else if (grad.scalar_type() == at::kHalf) {
          add_norms(grad.const_data_ptr<Half>(), kept, from, to, part);
        } else {
          add_norms(grad.const_data_ptr<float>(), kept, from, to, part);
        }
      }
    });
    for (size_t at = 0; at < parts.size(); ++at) {
      out[i * 3 + at % 3] += parts[at];
    }
  }
  return norms;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(ham_native, library) {
  library.def(
      "adam_ham_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, "
      "Tensor(c!)[] exp_avg_sqs, Tensor[] steps, Tensor?[] masks, Tensor(d!)?[] rounded, "
      "float[] a, float b, float clamp, float lr, float beta1, float beta2, float eps, "
      "float weight_decay, bool decoupled, Tensor(e!)? sums) -> ()");
  library.def(
      "sgd_ham_(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)?[] momentum_buffers, "
      "Tensor?[] masks, Tensor(c!)?[] rounded, float[] a, float b, float clamp, float lr, "
      "float momentum, bool nesterov, float weight_decay, bool is_first_step, "
      "Tensor(d!)? sums) -> ()");
  library.def("kept_norms(Tensor[] grads, Tensor?[] masks) -> Tensor");
}

TORCH_LIBRARY_IMPL(ham_native, CPU, library) {
  library.impl("adam_ham_", adam_ham_);
  library.impl("sgd_ham_", sgd_ham_);
  library.impl("kept_norms", kept_norms);
}
