// The paged KV cache and what a piece of attention work is.
#pragma once

#include <cstddef>
#include <cstdint>

#include "linear/format.h"

namespace fuserve {

inline constexpr int kBlockTokens = 32;   // tokens of a KV-cache block
inline constexpr int kSplitTokens = 512;  // tokens of a context split, a fixed place in every sum

enum class CacheType : int { f32 = 0, f16 = 1, i8 = 2, i4 = 3 };

enum class Nibbles : std::uint8_t {};  // two values of i4, each q + 8 with q from -7 to 7
inline constexpr int kNibbleZero = 8;

// The cache, block by block: for each layer and KV head the block's K, then its V.
//   K [padded_head_dim][32]: transposed, so that scores need no horizontal sums
//   V [32][padded_head_dim]
//   i4: K [padded_head_dim / 2][32], a byte being two consecutive features of a token;
//       V [32][padded_head_dim / 2], a byte being a feature of the first half and its like in the
//       second
//   i8, i4: then 32 scales of K's tokens, 32 of V's, in f32
// All layers of a block lie together, so that a sequence's first token commits one block's memory
// and not a page in every layer; its heads lie together, so that decoding reads long runs.
struct KVCache {
  std::byte* data = nullptr;
  CacheType type = CacheType::f32;
  int num_layers = 0;
  int num_blocks = 0;
  int num_kv_heads = 0;
  int padded_head_dim = 0;

  size_t head_elements() const {  // of K, and of V
    return static_cast<size_t>(padded_head_dim) * static_cast<size_t>(kBlockTokens);
  }
  bool is_scaled() const { return type >= CacheType::i8; }
  size_t keys_bytes() const { return head_elements() * element_bits() / 8; }  // and V's
  size_t head_bytes() const {
    return 2 * keys_bytes() + (is_scaled() ? 2 * kBlockTokens * sizeof(float) : 0);
  }
  size_t block_bytes() const {
    return head_bytes() * static_cast<size_t>(num_layers) * static_cast<size_t>(num_kv_heads);
  }
  size_t bytes() const { return block_bytes() * static_cast<size_t>(num_blocks); }
  std::byte* head(int layer, int block, int kv_head) const {
    const size_t index = (static_cast<size_t>(block) * static_cast<size_t>(num_layers) +
                          static_cast<size_t>(layer)) *
                             static_cast<size_t>(num_kv_heads) +
                         static_cast<size_t>(kv_head);
    return data + index * head_bytes();
  }

 private:
  size_t element_bits() const {
    constexpr size_t bits[] = {32, 16, 8, 4};
    return bits[static_cast<int>(type)];
  }
};

// One head of a block as the kernels read it. Scales are null where values are stored as they are.
template <class T>
struct CachedHead {
  T* keys = nullptr;              // [padded_head_dim][32]
  T* values = nullptr;            // [32][padded_head_dim]
  float* key_scales = nullptr;    // [32]
  float* value_scales = nullptr;  // [32]

  CachedHead(const KVCache& cache, int layer, int block, int kv_head)
      : keys(reinterpret_cast<T*>(cache.head(layer, block, kv_head))),
        values(keys + cache.keys_bytes() / sizeof(T)) {
    if (!cache.is_scaled()) return;
    key_scales = reinterpret_cast<float*>(values + cache.keys_bytes() / sizeof(T));
    value_scales = key_scales + kBlockTokens;
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

// The queries of one sequence's consecutive tokens for the heads of some KV heads.
struct AttentionTask {
  int layer = 0;
  int first_kv_head = 0;
  int num_kv_heads = 1;
  int window = 0;  // keys a query sees, itself included; 0: all
  int first_position = 0;
  int tokens = 0;
  const std::int32_t* block_table = nullptr;
  const float* queries = nullptr;   // of the first token and head, scaled; [token][head][padded]
  std::ptrdiff_t query_stride = 0;  // floats between tokens

  int first_key() const {
    return window > 0 && first_position >= window ? first_position - window + 1 : 0;
  }
  int last_key() const { return first_position + tokens - 1; }
  int first_split() const { return first_key() / kSplitTokens; }
  int end_split() const { return last_key() / kSplitTokens + 1; }
};

}  // namespace fuserve
