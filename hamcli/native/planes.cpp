// Blocks of the packed form, cut into planes and put together again: what planes.py does in numpy,
// with the same bytes.
//
// Memory is the caller's: addresses and lengths come from arrays that it holds. What a file can say
// (lengths of planes, gaps, escapes) is checked here against the size of the block.

#include <torch/library.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

constexpr int64_t MASK_FULL = 0, MASK_BITS = 1, MASK_GAPS = 2, MASK_EMPTY = 3;
constexpr int64_t TOP_BYTES = 0, TOP_QUADS = 1;
constexpr int64_t FILLER = 255;
constexpr uint8_t ESCAPE = 3;
constexpr int64_t GROUP = 64;        // elements of one word of a bitmap
constexpr int64_t CHUNK = 1 << 12;   // values that are put together at a time
constexpr int64_t RUN = 8;           // gaps that are taken together
constexpr int64_t WINDOW = 1 << 15;  // bytes cleared at a time, just before values are put there

// What merge_planes answers.
constexpr int64_t FITS = 0, WRONG_MASK = 1, WRONG_ESCAPES = 2, BEYOND = 3;

template <typename element_t>
element_t* at(int64_t address) {
  return reinterpret_cast<element_t*>(static_cast<uintptr_t>(address));
}

// Makes room, and keeps it: a vector that shrinks would be filled with zeros when it grows again.
template <typename element_t>
void grow(std::vector<element_t>& room, int64_t size) {
  if (static_cast<int64_t>(room.size()) < size) {
    room.resize(size);
  }
}

// How many bytes satisfy `is_counted`; sums of bytes are what compilers vectorise best.
template <typename function_t>
int64_t count(const uint8_t* bytes, int64_t size, const function_t& is_counted) {
  int64_t total = 0;
  for (int64_t begin = 0; begin < size; begin += 128) {
    uint8_t part = 0;
    if (begin + 128 <= size) {
      for (int64_t i = 0; i < 128; ++i) {
        part += is_counted(bytes[begin + i]);
      }
    } else {
      for (int64_t i = begin; i < size; ++i) {
        part += is_counted(bytes[i]);
      }
    }
    total += part;
  }
  return total;
}

// Calls f(an unsigned integer of that many bytes).
template <typename function_t>
auto with_width(int64_t width, const function_t& f) {
  TORCH_CHECK(width == 1 || width == 2 || width == 4 || width == 8, "elements of 1 to 8 bytes");
  return width == 1   ? f(uint8_t{})
         : width == 2 ? f(uint16_t{})
         : width == 4 ? f(uint32_t{})
                      : f(uint64_t{});
}

// ---- splitting ----

// One bit for each of 64 elements: whether any of its bits is set.
template <typename bits_t>
inline uint64_t word_of(const bits_t* bits) {
#if defined(__AVX2__)
  const auto* vectors = reinterpret_cast<const __m256i*>(bits);
  const __m256i zero = _mm256_setzero_si256();
  const auto load = [&](int i) { return _mm256_loadu_si256(vectors + i); };
  uint64_t zeros = 0;
  if constexpr (sizeof(bits_t) == 1) {
    for (int i = 0; i < 2; ++i) {
      const auto is_zero = _mm256_cmpeq_epi8(load(i), zero);
      zeros |= uint64_t{static_cast<uint32_t>(_mm256_movemask_epi8(is_zero))} << (32 * i);
    }
  } else if constexpr (sizeof(bits_t) == 2) {
    for (int i = 0; i < 2; ++i) {
      const auto packed = _mm256_packs_epi16(_mm256_cmpeq_epi16(load(2 * i), zero),
                                             _mm256_cmpeq_epi16(load(2 * i + 1), zero));
      const auto ordered = _mm256_permute4x64_epi64(packed, 0b11011000);
      zeros |= uint64_t{static_cast<uint32_t>(_mm256_movemask_epi8(ordered))} << (32 * i);
    }
  } else if constexpr (sizeof(bits_t) == 4) {
    for (int i = 0; i < 8; ++i) {
      const auto is_zero = _mm256_castsi256_ps(_mm256_cmpeq_epi32(load(i), zero));
      zeros |= uint64_t{static_cast<uint32_t>(_mm256_movemask_ps(is_zero))} << (8 * i);
    }
  } else {
    for (int i = 0; i < 16; ++i) {
      const auto is_zero = _mm256_castsi256_pd(_mm256_cmpeq_epi64(load(i), zero));
      zeros |= uint64_t{static_cast<uint32_t>(_mm256_movemask_pd(is_zero))} << (4 * i);
    }
  }
  return ~zeros;
#else
  uint64_t word = 0;
  for (int i = 0; i < GROUP; ++i) {
    word |= uint64_t{bits[i] != 0} << i;
  }
  return word;
#endif
}

template <typename bits_t>
uint64_t last_word_of(const bits_t* bits, int64_t size) {
  uint64_t word = 0;
  for (int64_t i = 0; i < size; ++i) {
    word |= uint64_t{bits[i] != 0} << i;
  }
  return word;
}

template <typename bits_t>
int64_t make_words(const bits_t* bits, int64_t size, std::vector<uint64_t>& words) {
  words.resize((size + GROUP - 1) / GROUP);
  const int64_t whole = size / GROUP;
  int64_t num_values = 0;
  for (int64_t i = 0; i < whole; ++i) {
    words[i] = word_of(bits + i * GROUP);
    num_values += std::popcount(words[i]);
  }
  if (whole * GROUP < size) {
    words[whole] = last_word_of(bits + whole * GROUP, size - whole * GROUP);
    num_values += std::popcount(words[whole]);
  }
  return num_values;
}

template <typename bits_t>
void gather(const bits_t* bits, const std::vector<uint64_t>& words, bits_t* values) {
  for (size_t i = 0; i < words.size(); ++i) {
    const bits_t* group = bits + i * GROUP;
    for (uint64_t word = words[i]; word != 0; word &= word - 1) {
      *values++ = group[std::countr_zero(word)];
    }
  }
}

// As `gather`, with the gaps in front of the values; how many bytes these are.
template <typename bits_t>
int64_t gather_with_gaps(const bits_t* bits, const std::vector<uint64_t>& words, bits_t* values,
                         uint8_t* gaps) {
  uint8_t* next = gaps;
  int64_t last = -1;
  for (size_t i = 0; i < words.size(); ++i) {
    for (uint64_t word = words[i]; word != 0; word &= word - 1) {
      const int64_t position = static_cast<int64_t>(i) * GROUP + std::countr_zero(word);
      *values++ = bits[position];
      int64_t gap = position - last - 1;
      for (; gap >= FILLER; gap -= FILLER) {
        *next++ = FILLER;
      }
      *next++ = static_cast<uint8_t>(gap);
      last = position;
    }
  }
  return next - gaps;
}

template <typename bits_t>
bits_t to_offsets(bits_t* values, int64_t num_values, bool rotated) {
  constexpr int top_bit = 8 * sizeof(bits_t) - 1;
  if (rotated) {
    for (int64_t i = 0; i < num_values; ++i) {
      values[i] = static_cast<bits_t>((values[i] << 1) | (values[i] >> top_bit));
    }
  }
  bits_t offset = static_cast<bits_t>(~bits_t{0});
  for (int64_t i = 0; i < num_values; ++i) {
    offset = std::min(offset, values[i]);
  }
  offset = static_cast<bits_t>(offset & ~bits_t{rotated});
  for (int64_t i = 0; i < num_values; ++i) {
    values[i] = static_cast<bits_t>(values[i] - offset);
  }
  return offset;
}

template <typename bits_t>
void cut(const bits_t* values, int64_t num_values, int byte, uint8_t* plane) {
  for (int64_t i = 0; i < num_values; ++i) {
    plane[i] = static_cast<uint8_t>(values[i] >> (8 * byte));
  }
}

// Packs the tops in place where two bits are enough for nearly all; the number of escapes, or -1.
int64_t pack_tops(uint8_t* top, int64_t num_values, uint8_t* escapes) {
  const int64_t num_escapes =
      count(top, num_values, [](uint8_t one) { return one >= ESCAPE; });
  if (num_escapes > num_values / 64) {
    return -1;
  }
  if (num_escapes > 0) {
    for (int64_t i = 0; i < num_values; ++i) {
      if (top[i] >= ESCAPE) {
        *escapes++ = top[i];
        top[i] = ESCAPE;
      }
    }
  }
  const int64_t whole = num_values / 4;
  for (int64_t i = 0; i < whole; ++i) {
    uint32_t codes;
    std::memcpy(&codes, top + 4 * i, 4);
    top[i] = static_cast<uint8_t>(codes | codes >> 6 | codes >> 12 | codes >> 18);
  }
  if (4 * whole < num_values) {
    uint8_t quad = 0;
    for (int64_t i = 4 * whole; i < num_values; ++i) {
      quad |= top[i] << (2 * (i % 4));
    }
    top[whole] = quad;
  }
  return num_escapes;
}

// Planes are written to `out`: mask, top, escapes, the rest from the highest byte down. Answers
// mask coding, top coding, number of values, offset, lengths of mask, top and escapes.
template <typename bits_t>
std::vector<int64_t> split(const bits_t* bits, int64_t size, bool rotated,
                           c10::IntArrayRef out) {
  static thread_local std::vector<uint64_t> words;
  static thread_local std::vector<bits_t> values;
  const int64_t num_values = make_words(bits, size, words);
  if (num_values == 0) {
    return {MASK_EMPTY, TOP_BYTES, 0, 0, 0, 0, 0};
  }
  grow(values, num_values);
  int64_t mask_coding = MASK_FULL, mask_bytes = 0;
  if (num_values == size) {
    std::memcpy(values.data(), bits, size * sizeof(bits_t));
  } else if (num_values * 16 < size * 3) {
    mask_coding = MASK_GAPS;
    mask_bytes = gather_with_gaps(bits, words, values.data(), at<uint8_t>(out[0]));
  } else {
    mask_coding = MASK_BITS;
    mask_bytes = (size + 7) / 8;
    std::memcpy(at<uint8_t>(out[0]), words.data(), mask_bytes);
    gather(bits, words, values.data());
  }
  const bits_t offset = to_offsets(values.data(), num_values, rotated);
  constexpr int width = sizeof(bits_t);
  for (int byte = width - 1; byte >= 0; --byte) {
    const int64_t plane = byte == width - 1 ? out[1] : out[width + 1 - byte];
    cut(values.data(), num_values, byte, at<uint8_t>(plane));
  }
  const int64_t num_escapes = pack_tops(at<uint8_t>(out[1]), num_values, at<uint8_t>(out[2]));
  const bool is_quads = num_escapes >= 0;
  return {mask_coding,
          is_quads ? TOP_QUADS : TOP_BYTES,
          num_values,
          static_cast<int64_t>(offset),
          mask_bytes,
          is_quads ? (num_values + 3) / 4 : num_values,
          is_quads ? num_escapes : 0};
}

std::vector<int64_t> split_planes(int64_t bits, int64_t size, int64_t width, bool rotated,
                                  c10::IntArrayRef out) {
  TORCH_CHECK(static_cast<int64_t>(out.size()) == width + 2, "a place for each plane");
  return with_width(width, [&](auto element) {
    using bits_t = decltype(element);
    return split(at<const bits_t>(bits), size, rotated, out);
  });
}

// ---- merging ----

constexpr std::array<uint32_t, 256> make_codes() {
  std::array<uint32_t, 256> codes{};
  for (uint32_t quad = 0; quad < 256; ++quad) {
    codes[quad] = (quad & 3) | (quad >> 2 & 3) << 8 | (quad >> 4 & 3) << 16 | (quad >> 6) << 24;
  }
  return codes;
}

constexpr std::array<uint32_t, 256> CODES = make_codes();

struct Plane {
  const uint8_t* bytes;
  int64_t length;
};

// The tops of values, from quads and escapes, some thousand at a time.
class Tops {
 public:
  Tops(Plane quads, Plane escapes) : quads_(quads), next_(escapes.bytes) {
    end_ = next_ + escapes.length;
  }

  // The `size` tops from `begin`, a multiple of four; null where there are too few escapes.
  const uint8_t* take(int64_t begin, int64_t size) {
    const uint8_t* quads = quads_.bytes + begin / 4;
    for (int64_t i = 0; i < (size + 3) / 4; ++i) {
      std::memcpy(tops_ + 4 * i, &CODES[quads[i]], 4);
    }
    int64_t left = count(tops_, size, [](uint8_t one) { return one == ESCAPE; });
    if (left > end_ - next_) {
      return nullptr;
    }
    for (int64_t i = 0; left > 0; ++i) {
      if (tops_[i] == ESCAPE) {
        tops_[i] = *next_++;
        --left;
      }
    }
    return tops_;
  }

  // Whether all escapes were taken, and nothing stands behind the last of all tops.
  bool is_done(int64_t num_values) const {
    const int64_t used = num_values % 4;
    return next_ == end_ && (used == 0 || quads_.bytes[num_values / 4] >> (2 * used) == 0);
  }

 private:
  Plane quads_;
  const uint8_t* next_;
  const uint8_t* end_;
  uint8_t tops_[CHUNK];
};

template <typename bits_t>
void assemble(const uint8_t* __restrict top, const Plane* rest, int64_t begin, int64_t size,
              bits_t offset, bool rotated, bits_t* __restrict values) {
  constexpr int bits = 8 * sizeof(bits_t);
  for (int64_t i = 0; i < size; ++i) {
    values[i] = top[i];
  }
  if constexpr (sizeof(bits_t) > 1) {
    for (size_t plane = 0; plane + 1 < sizeof(bits_t); ++plane) {
      const uint8_t* __restrict low = rest[plane].bytes + begin;
      for (int64_t i = 0; i < size; ++i) {
        values[i] = static_cast<bits_t>((values[i] << 8) | low[i]);
      }
    }
  }
  if (rotated) {
    for (int64_t i = 0; i < size; ++i) {
      const bits_t value = static_cast<bits_t>(values[i] + offset);
      values[i] = static_cast<bits_t>((value >> 1) | (value << (bits - 1)));
    }
  } else {
    for (int64_t i = 0; i < size; ++i) {
      values[i] = static_cast<bits_t>(values[i] + offset);
    }
  }
}

// All values in order; false where the escapes do not fit.
template <typename bits_t>
bool assemble_all(const std::vector<Plane>& planes, int64_t top_coding, int64_t num_values,
                  bits_t offset, bool rotated, bits_t* values) {
  const bool is_quads = top_coding == TOP_QUADS;
  Tops tops(is_quads ? planes[1] : Plane{nullptr, 0}, planes[2]);
  for (int64_t begin = 0; begin < num_values; begin += CHUNK) {
    const int64_t size = std::min(CHUNK, num_values - begin);
    const uint8_t* top = is_quads ? tops.take(begin, size) : planes[1].bytes + begin;
    if (top == nullptr) {
      return false;
    }
    assemble(top, planes.data() + 3, begin, size, offset, rotated, values + begin);
  }
  return !is_quads || tops.is_done(num_values);
}

template <typename bits_t>
int64_t scatter_gaps(Plane gaps, const bits_t* values, int64_t num_values, bits_t* out,
                     int64_t size) {
  constexpr int64_t window = WINDOW / sizeof(bits_t);
  if (count(gaps.bytes, gaps.length, [](uint8_t one) { return one != FILLER; }) != num_values) {
    return WRONG_MASK;
  }
  const uint8_t* next = gaps.bytes;
  const uint8_t* const end = next + gaps.length;
  int64_t position = -1;
  for (int64_t cleared = 0; cleared < size;) {
    const int64_t room = std::min(window, size - cleared);
    std::memset(out + cleared, 0, room * sizeof(bits_t));
    cleared += room;
    // far from the end of the window a few values need no look at it
    while (end - next >= RUN && position + RUN * (FILLER + 1) < cleared) {
      for (int64_t i = 0; i < RUN; ++i) {
        const int64_t gap = *next++;
        if (gap == FILLER) {
          position += FILLER;
        } else {
          position += gap + 1;
          out[position] = *values++;
        }
      }
    }
    while (next < end && (*next == FILLER || position + *next + 1 < cleared)) {
      const int64_t gap = *next++;
      if (gap == FILLER) {
        position += FILLER;
      } else {
        position += gap + 1;
        out[position] = *values++;
      }
    }
  }
  return next == end ? FITS : BEYOND;
}

template <typename bits_t>
int64_t scatter_bits(Plane mask, const bits_t* values, int64_t num_values, bits_t* out,
                     int64_t size) {
  int64_t used = 0;
  for (int64_t begin = 0; begin < size; begin += GROUP) {
    const int64_t count = std::min(GROUP, size - begin);
    uint64_t word = 0;
    std::memcpy(&word, mask.bytes + begin / 8, (count + 7) / 8);
    if ((count < GROUP && word >> count != 0) || std::popcount(word) > num_values - used) {
      return WRONG_MASK;
    }
    std::memset(out + begin, 0, count * sizeof(bits_t));
    for (; word != 0; word &= word - 1) {
      out[begin + std::countr_zero(word)] = values[used++];
    }
  }
  return used == num_values ? FITS : WRONG_MASK;
}

template <typename bits_t>
int64_t merge(const std::vector<Plane>& planes, bits_t* out, int64_t size, int64_t mask_coding,
              int64_t top_coding, int64_t num_values, bits_t offset, bool rotated) {
  static thread_local std::vector<bits_t> room;
  bits_t* values = out;
  if (mask_coding != MASK_FULL) {
    grow(room, num_values);
    values = room.data();
  }
  if (!assemble_all(planes, top_coding, num_values, offset, rotated, values)) {
    return WRONG_ESCAPES;
  }
  if (mask_coding == MASK_FULL) {
    return FITS;
  }
  return mask_coding == MASK_BITS
             ? scatter_bits(planes[0], values, num_values, out, size)
             : scatter_gaps(planes[0], values, num_values, out, size);
}

// Lengths are those that planes.py checked: tops and rest hold a byte, or two bits, for each value.
int64_t merge_planes(c10::IntArrayRef addresses, c10::IntArrayRef lengths, int64_t out,
                     int64_t size, int64_t width, int64_t mask_coding, int64_t top_coding,
                     int64_t num_values, int64_t offset, bool rotated) {
  TORCH_CHECK(static_cast<int64_t>(addresses.size()) == width + 2 &&
                  addresses.size() == lengths.size(),
              "all planes");
  std::vector<Plane> planes;
  for (size_t i = 0; i < addresses.size(); ++i) {
    planes.push_back({at<const uint8_t>(addresses[i]), lengths[i]});
  }
  const int64_t tops = top_coding == TOP_BYTES ? num_values : (num_values + 3) / 4;
  bool fits = num_values <= size && planes[1].length == tops;
  fits &= mask_coding != MASK_FULL || num_values == size;
  fits &= mask_coding != MASK_BITS || planes[0].length == (size + 7) / 8;
  for (size_t i = 3; i < planes.size(); ++i) {
    fits &= planes[i].length == num_values;
  }
  TORCH_CHECK(fits, "planes of the wrong length");
  return with_width(width, [&](auto element) {
    using bits_t = decltype(element);
    return merge(planes, at<bits_t>(out), size, mask_coding, top_coding, num_values,
                 static_cast<bits_t>(offset), rotated);
  });
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(ham_native, library) {
  library.def("split_planes(int bits, int size, int width, bool rotated, int[] out) -> int[]",
              split_planes);
  library.def(
      "merge_planes(int[] addresses, int[] lengths, int out, int size, int width, "
      "int mask_coding, int top_coding, int num_values, int offset, bool rotated) -> int",
      merge_planes);
}
