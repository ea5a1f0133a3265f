// Numbers known at run time as template arguments.
#pragma once

namespace fuserve {

// Calls f with `count`, at most Max, as a compile-time constant.
template <int Max, class F>
void with_count(int count, F&& f) {
  if constexpr (Max > 1) {
    if (count < Max) return with_count<Max - 1>(count, f);
  }
  f.template operator()<Max>();
}

}  // namespace fuserve
