// Magnitudes of weights as bits, without torch: counts of their digits, and zeros in place.
//
// A weight's magnitude is its bits without the sign: of floats, bit order is value order. Counts are
// added to those that the caller has, in int64. Called through ctypes with addresses and lengths.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

namespace {

constexpr int64_t GROUP = 64;  // weights that are looked at together; most groups hold no match
constexpr int64_t TABLES = 4;  // of counts, in turn: equal neighbours would wait for each other

template <typename bits_t>
constexpr bits_t MAGNITUDE = std::numeric_limits<bits_t>::max() >> 1;

template <typename bits_t>
inline bits_t magnitude(bits_t bits) {
  return bits & MAGNITUDE<bits_t>;
}

// Counts of the first 15 bits of the magnitudes; gives the number of zeros.
template <typename bits_t>
int64_t count_top(const bits_t* bits, int64_t numel, int64_t* counts) {
  constexpr int64_t DIGITS = 1 << 15;
  constexpr int SHIFT = 8 * sizeof(bits_t) - 16;
  static thread_local std::vector<uint32_t> found;
  found.assign(TABLES * DIGITS, 0);
  uint32_t* tables = found.data();
  int64_t zeros = 0, i = 0;
  for (; i + TABLES <= numel; i += TABLES) {
    for (int64_t j = 0; j < TABLES; ++j) {
      const bits_t key = magnitude(bits[i + j]);
      ++tables[j * DIGITS + (key >> SHIFT)];
      if (SHIFT != 0) {
        zeros += key == 0;
      }
    }
  }
  for (; i < numel; ++i) {
    const bits_t key = magnitude(bits[i]);
    ++tables[key >> SHIFT];
    zeros += SHIFT != 0 && key == 0;
  }
  for (int64_t digit = 0; digit < DIGITS; ++digit) {
    int64_t sum = 0;
    for (int64_t j = 0; j < TABLES; ++j) {
      sum += tables[j * DIGITS + digit];
    }
    counts[digit] += sum;
    if (SHIFT == 0 && digit == 0) {
      zeros = sum;
    }
  }
  return zeros;
}

// Zeroes what is below the key and the first `ties` of what is at it; gives the ties left over.
template <typename bits_t>
int64_t cut(bits_t* bits, int64_t numel, bits_t limit, int64_t ties) {
  int64_t i = 0;
  while (ties > 0 && i < numel) {
    const int64_t end = std::min(i + GROUP, numel);
    int matches = 0;
    for (int64_t j = i; j < end; ++j) {
      const bits_t key = magnitude(bits[j]);
      matches |= key == limit;
      bits[j] = key < limit ? bits_t{0} : bits[j];
    }
    for (int64_t j = i; matches && ties > 0 && j < end; ++j) {
      // what was zeroed just now is at the key only if the key is zero, and then it counts
      if (magnitude(bits[j]) == limit) {
        bits[j] = 0;
        --ties;
      }
    }
    i = end;
  }
  for (; i < numel; ++i) {
    const bits_t key = magnitude(bits[i]);
    bits[i] = key < limit ? bits_t{0} : bits[i];
  }
  return ties;
}

// Of each `size` weights at a distance of `inner`, keeps the `kept` largest; of equal ones the
// first go.
template <typename bits_t>
void keep_of_groups(bits_t* bits, int64_t groups, int64_t size, int64_t inner, int64_t kept) {
  std::vector<bits_t> keys(size);
  for (int64_t group = 0; group < groups; ++group) {
    bits_t* first = bits + group * size * inner;
    for (int64_t at = 0; at < inner; ++at) {
      for (int64_t i = 0; i < size; ++i) {
        keys[i] = magnitude(first[i * inner + at]);
      }
      for (int64_t i = 0; i < size; ++i) {
        int64_t smaller = 0;
        for (int64_t j = 0; j < size; ++j) {
          smaller += keys[j] < keys[i] || (keys[j] == keys[i] && j < i);
        }
        if (smaller < size - kept || keys[i] == 0) {
          first[i * inner + at] = 0;
        }
      }
    }
  }
}

// The same for groups of four neighbours, without a branch.
template <typename bits_t>
void keep_of_four(bits_t* bits, int64_t groups, int64_t kept) {
  const int drops = static_cast<int>(4 - kept);
  for (int64_t group = 0; group < groups; ++group) {
    bits_t* w = bits + 4 * group;
    const bits_t a = magnitude(w[0]), b = magnitude(w[1]), c = magnitude(w[2]), d = magnitude(w[3]);
    const int ab = b < a, ac = c < a, ad = d < a, bc = c < b, bd = d < b, cd = d < c;
    const int ranks[4] = {ab + ac + ad, 1 - ab + bc + bd, 2 - ac - bc + cd, 3 - ad - bd - cd};
    for (int i = 0; i < 4; ++i) {
      const bits_t keeps = static_cast<bits_t>(-static_cast<bits_t>(ranks[i] >= drops));
      w[i] &= keeps & static_cast<bits_t>(-static_cast<bits_t>(magnitude(w[i]) != 0));
    }
  }
}

template <typename bits_t>
void keep_n_of_m(bits_t* bits, int64_t groups, int64_t size, int64_t inner, int64_t kept) {
  if (size == 4 && inner == 1) {
    keep_of_four(bits, groups, kept);
  } else {
    keep_of_groups(bits, groups, size, inner, kept);
  }
}

}  // namespace

extern "C" {

int64_t ham_count_top_16(const uint16_t* bits, int64_t numel, int64_t* counts) {
  return count_top(bits, numel, counts);
}

int64_t ham_count_top_32(const uint32_t* bits, int64_t numel, int64_t* counts) {
  return count_top(bits, numel, counts);
}

// Counts of the last 16 bits of the magnitudes that begin with `begins`.
void ham_count_low_32(const uint32_t* bits, int64_t numel, uint32_t begins, int64_t* counts) {
  for (int64_t i = 0; i < numel; i += GROUP) {
    const int64_t end = std::min(i + GROUP, numel);
    int matches = 0;
    for (int64_t j = i; j < end; ++j) {
      matches |= (magnitude(bits[j]) >> 16) == begins;
    }
    for (int64_t j = i; matches && j < end; ++j) {
      if ((magnitude(bits[j]) >> 16) == begins) {
        ++counts[bits[j] & 0xffff];
      }
    }
  }
}

int64_t ham_cut_16(uint16_t* bits, int64_t numel, uint16_t limit, int64_t ties) {
  return cut(bits, numel, limit, ties);
}

int64_t ham_cut_32(uint32_t* bits, int64_t numel, uint32_t limit, int64_t ties) {
  return cut(bits, numel, limit, ties);
}

void ham_n_of_m_16(uint16_t* bits, int64_t groups, int64_t size, int64_t inner, int64_t kept) {
  keep_n_of_m(bits, groups, size, inner, kept);
}

void ham_n_of_m_32(uint32_t* bits, int64_t groups, int64_t size, int64_t inner, int64_t kept) {
  keep_n_of_m(bits, groups, size, inner, kept);
}

// The number of zeros and the greatest magnitude.
int64_t ham_zeros_16(const uint16_t* bits, int64_t numel, uint64_t* greatest) {
  int64_t zeros = 0;
  uint16_t most = 0;
  for (int64_t i = 0; i < numel; i += 1 << 15) {
    const int64_t end = std::min(i + (1 << 15), numel);
    uint16_t found = 0;
    for (int64_t j = i; j < end; ++j) {
      const uint16_t key = magnitude(bits[j]);
      found += key == 0;
      most = std::max(most, key);
    }
    zeros += found;
  }
  *greatest = most;
  return zeros;
}

int64_t ham_zeros_32(const uint32_t* bits, int64_t numel, uint64_t* greatest) {
  int64_t zeros = 0;
  uint32_t most = 0;
  for (int64_t i = 0; i < numel; i += 1 << 20) {
    const int64_t end = std::min(i + (1 << 20), numel);
    uint32_t found = 0;
    for (int64_t j = i; j < end; ++j) {
      const uint32_t key = magnitude(bits[j]);
      found += key == 0;
      most = std::max(most, key);
    }
    zeros += found;
  }
  *greatest = most;
  return zeros;
}

}
