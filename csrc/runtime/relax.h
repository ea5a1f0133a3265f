// What a thread does between two looks at a value that another is about to change.
#pragma once

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fuserve {

inline void relax() {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

}  // namespace fuserve
