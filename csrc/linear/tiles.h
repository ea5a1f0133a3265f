// How a product is cut for the micro-kernels.
#pragma once

#include "simd/simd.h"

namespace fuserve::FUSERVE_ISA {

// Calls f with `count`, at most Max, as a compile-time constant.
template <int Max, class F>
void with_count(int count, F&& f) {
  if constexpr (Max > 1) {
    if (count < Max) return with_count<Max - 1>(count, f);
  }
  f.template operator()<Max>();
}

// Calls f<R>(tile) for tiles [first, last), R of them at once where `paired`.
template <class F>
void for_each_tiles(int first, int last, bool paired, F&& f) {
  int tile = first;
  if constexpr (kTilesAtOnce > 1) {
    for (; paired && tile + kTilesAtOnce <= last; tile += kTilesAtOnce)
      f.template operator()<kTilesAtOnce>(tile);
  }
  for (; tile < last; ++tile) f.template operator()<1>(tile);
}

}  // namespace fuserve::FUSERVE_ISA
