// Writing one token's key or value into its slot of a cache block.
#pragma once

#include "attention/attention.h"

namespace fuserve::FUSERVE_ISA {

// row: [padded_head_dim]
inline void append_key(const KVCache& cache, int layer, int block, int kv_head, int slot,
                       const float* row) {
  const size_t at = cache.k_offset(layer, block, kv_head) + static_cast<size_t>(slot);
  for (int d = 0; d < cache.padded_head_dim; ++d) {
    const size_t i = at + static_cast<size_t>(d) * kBlockTokens;
    if (cache.half)
      static_cast<Half*>(cache.data)[i] = to_half(row[d]);
    else
      static_cast<float*>(cache.data)[i] = row[d];
  }
}

inline void append_value(const KVCache& cache, int layer, int block, int kv_head, int slot,
                         const float* row) {
  const size_t at = cache.v_offset(layer, block, kv_head) +
                    static_cast<size_t>(slot) * static_cast<size_t>(cache.padded_head_dim);
  for (int d = 0; d < cache.padded_head_dim; d += 16) {
    const size_t i = at + static_cast<size_t>(d);
    if (cache.half)
      store16(static_cast<Half*>(cache.data) + i, load16(row + d));
    else
      store16(static_cast<float*>(cache.data) + i, load16(row + d));
  }
}

}  // namespace fuserve::FUSERVE_ISA
