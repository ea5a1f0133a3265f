// The paged KV cache and what a piece of attention work is.
#pragma once

#include <cstddef>
#include <cstdint>

#include "linear/format.h"

namespace fuserve {

inline constexpr int kBlockTokens = 32;   // tokens of a KV-cache block
inline constexpr int kSplitTokens = 512;  // tokens of a context split, a fixed place in every sum

// The cache of all layers: for each layer, block and KV head its K, then its V.
//   K [padded_head_dim][32]: transposed, so that scores need no horizontal sums
//   V [32][padded_head_dim]
struct KVCache {
  void* data = nullptr;
  bool half = false;
  int num_blocks = 0;
  int num_kv_heads = 0;
  int padded_head_dim = 0;

  size_t head_elements() const {
    return static_cast<size_t>(padded_head_dim) * static_cast<size_t>(kBlockTokens);
  }
  size_t block_elements() const { return 2 * head_elements() * static_cast<size_t>(num_kv_heads); }
  size_t layer_bytes() const {
    return block_elements() * static_cast<size_t>(num_blocks) * (half ? 2 : 4);
  }
  size_t k_offset(int layer, int block, int kv_head) const {
    return (static_cast<size_t>(layer) * static_cast<size_t>(num_blocks) +
            static_cast<size_t>(block)) *
               block_elements() +
           2 * head_elements() * static_cast<size_t>(kv_head);
  }
  size_t v_offset(int layer, int block, int kv_head) const {
    return k_offset(layer, block, kv_head) + head_elements();
  }
};

struct AttentionShape {
  int num_heads = 0;
  int num_kv_heads = 0;
  int head_dim = 0;
  float softcap = 0.0F;                 // 0: none
  const float* alibi_slopes = nullptr;  // [num_heads]; null: none

  int padded_head_dim() const { return round_up(head_dim, kTileRows); }
  int heads_per_kv() const { return num_heads / num_kv_heads; }
};

// The queries of one sequence's consecutive tokens for the heads that share one KV head.
struct AttentionTask {
  int layer = 0;
  int kv_head = 0;
  int window = 0;  // keys a query sees, itself included; 0: all
  int first_position = 0;
  int tokens = 0;
  const std::int32_t* block_table = nullptr;
  const float* queries = nullptr;  // of the first token and head, scaled; [token][head][padded dim]
  std::ptrdiff_t query_stride = 0;  // floats between tokens

  int first_key() const {
    return window > 0 && first_position >= window ? first_position - window + 1 : 0;
  }
  int last_key() const { return first_position + tokens - 1; }
  int first_split() const { return first_key() / kSplitTokens; }
  int end_split() const { return last_key() / kSplitTokens + 1; }
};

}  // namespace fuserve
