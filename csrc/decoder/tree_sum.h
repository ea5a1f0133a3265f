// Parts of a sum, added in one fixed order: halves, recursively; the first has one more of an odd
// number. So two ranks with two parts each get what four ranks with one each get.
#pragma once

#include <cstddef>

#include "linear/tiles.h"
#include "norm/norm.h"
#include "simd/simd.h"

namespace fuserve::FUSERVE_ISA {

// Sixteen floats from `at` of N parts, as load(part) gives them.
template <int N, class Load>
F32x16 tree_of(const float* const* parts, Load&& load) {
  if constexpr (N == 1) {
    return load(parts[0]);
  } else {
    constexpr int half = (N + 1) / 2;
    return add(tree_of<half>(parts, load), tree_of<N - half>(parts + half, load));
  }
}

template <class Load>
F32x16 tree_of(const float* const* parts, int count, Load&& load) {
  if (count == 1) return load(parts[0]);
  const int half = (count + 1) / 2;
  return add(tree_of(parts, half, load), tree_of(parts + half, count - half, load));
}

// Calls f(k, n, sum) for runs of n <= 16 of the `size` floats that the parts have from `first` on.
template <class F>
void tree_sum(const float* const* parts, int count, std::ptrdiff_t first, int size, F&& f) {
  const auto sums = [&](auto&& tree) {
    for_lanes(size, [&](int k, int n) {
      f(k, n, tree([&](const float* part) {
          const float* p = part + first + k;
          return n == 16 ? load16(p) : load_n(p, n);
        }));
    });
  };
  constexpr int kUnrolled = 4;
  if (count > kUnrolled) {
    sums([&](auto&& load) { return tree_of(parts, count, load); });
  } else {
    with_count<kUnrolled>(
        count, [&]<int N>() { sums([&](auto&& load) { return tree_of<N>(parts, load); }); });
  }
}

}  // namespace fuserve::FUSERVE_ISA
