#include "image/flash_attention.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "linear/format.h"
#include "linear/tiles.h"
#include "simd/simd.h"

namespace fuserve::FUSERVE_ISA {
namespace {

// The sixteen lanes are queries: then K and V are read where they lie, a value at a time, and a
// softmax is as many as there are lanes, without a sum or maximum across them. Only queries are
// transposed, once, and outputs back at the end.
constexpr int kLanes = 16;
constexpr int kKeys = 64;  // of a block, after which the running maximum is renewed

// A tile of 16 queries: transposed queries and sums [head_dim][16], and the softmax so far [16].
struct QueryTile {
  float* queries;
  float* sums;
  float* largest;
  float* total;

  static size_t floats(int head_dim) {
    return static_cast<size_t>(2 * head_dim * kLanes + 2 * kLanes);
  }
  static QueryTile at(float* memory, int head_dim) {
    return {memory, memory + head_dim * kLanes, memory + 2 * head_dim * kLanes,
            memory + 2 * head_dim * kLanes + kLanes};
  }
};

// scores[key][lane] of N keys.
template <int N>
void score_kernel(const float* queries, int head_dim, const float* keys, std::ptrdiff_t stride,
                  float* scores) {
  F32x16 acc[N];
#pragma GCC unroll 16
  for (int n = 0; n < N; ++n) acc[n] = zero();
  for (int d = 0; d < head_dim; ++d) {
    const F32x16 q = load16(queries + d * kLanes);
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) acc[n] = fma(q, set1(keys[n * stride + d]), acc[n]);
  }
#pragma GCC unroll 16
  for (int n = 0; n < N; ++n) store16(scores + n * kLanes, acc[n]);
}

// sums[d][lane] = sums * decay + weights[key][lane] . values[key][d] for N features.
template <int N>
void value_kernel(const float* weights, int num_keys, const float* values, std::ptrdiff_t stride,
                  F32x16 decay, float* sums) {
  F32x16 acc[N];
#pragma GCC unroll 16
  for (int n = 0; n < N; ++n) acc[n] = mul(load16(sums + n * kLanes), decay);
  for (int key = 0; key < num_keys; ++key) {
    const F32x16 w = load16(weights + key * kLanes);
    const float* v = values + key * stride;
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) acc[n] = fma(w, set1(v[n]), acc[n]);
  }
#pragma GCC unroll 16
  for (int n = 0; n < N; ++n) store16(sums + n * kLanes, acc[n]);
}

// Turns scores of a block into exp2(score - largest), renews the maximum and the total. Returns
// what earlier sums shrink by.
F32x16 softmax(float* scores, int num_keys, const QueryTile& tile) {
  const F32x16 before = load16(tile.largest);
  F32x16 largest = before;
  for (int key = 0; key < num_keys; ++key) largest = max(load16(scores + key * kLanes), largest);
  const F32x16 decay = exp2(sub(before, largest));
  F32x16 total = mul(load16(tile.total), decay);
  for (int key = 0; key < num_keys; ++key) {
    const F32x16 weight = exp2(sub(load16(scores + key * kLanes), largest));
    store16(scores + key * kLanes, weight);
    total = add(total, weight);
  }
  store16(tile.largest, largest);
  store16(tile.total, total);
  return decay;
}

void load_queries(const FlashTask& task, int first, const QueryTile& tile) {
  // exp2 instead of exp: its argument is divided by ln 2 here, once.
  const float scale = 1.44269504F / std::sqrt(static_cast<float>(task.head_dim));
  for (int lane = 0; lane < kLanes; ++lane) {
    // Lanes past the last query repeat it.
    const float* row = task.queries.row(std::min(first + lane, task.last_query - 1));
    for (int d = 0; d < task.head_dim; ++d) tile.queries[d * kLanes + lane] = row[d] * scale;
  }
  std::fill_n(tile.sums, task.head_dim * kLanes, 0.0F);
  store16(tile.largest, set1(-std::numeric_limits<float>::infinity()));
  store16(tile.total, zero());
}

void store_outputs(const FlashTask& task, int first, const QueryTile& tile) {
  const F32x16 inverse = div(set1(1.0F), load16(tile.total));
  for (int d = 0; d < task.head_dim; ++d)
    store16(tile.sums + d * kLanes, mul(load16(tile.sums + d * kLanes), inverse));
  for (int lane = 0; lane < std::min(kLanes, task.last_query - first); ++lane) {
    float* row = task.out.row(first + lane);
    for (int d = 0; d < task.head_dim; ++d) row[d] = tile.sums[d * kLanes + lane];
  }
}

// A block of keys and their values, copied to rows an odd number of cache lines apart: where they
// come from, rows may all share a few sets of the first-level cache.
struct KeyBlock {
  float* keys;
  float* values;
  std::ptrdiff_t stride;
  int first;
  int count;
};

std::ptrdiff_t block_stride(int head_dim) { return (ceil_div(head_dim, 16) | 1) * 16; }

void load_keys(const FlashTask& task, const KeyBlock& block) {
  for (int key = 0; key < block.count; ++key) {
    std::copy_n(task.keys.row(block.first + key), task.head_dim, block.keys + key * block.stride);
    std::copy_n(task.values.row(block.first + key), task.head_dim,
                block.values + key * block.stride);
  }
}

void attend_block(const FlashTask& task, int first_query, const KeyBlock& block,
                  const QueryTile& tile, float* scores) {
  const int num_keys = block.count, first_key = block.first;
  for (int key = 0; key < num_keys; key += kFloatTokens)
    with_count<kFloatTokens>(num_keys - key, [&]<int N>() {
      score_kernel<N>(tile.queries, task.head_dim, block.keys + key * block.stride, block.stride,
                      scores + key * kLanes);
    });
  if (task.causal)
    for (int key = std::max(0, first_query + 1 - first_key); key < num_keys; ++key) {
      const F32x16 visible = keep(load16(scores + key * kLanes), first_key + key - first_query,
                                  kLanes, -std::numeric_limits<float>::infinity());
      store16(scores + key * kLanes, visible);
    }
  const F32x16 decay = softmax(scores, num_keys, tile);
  for (int d = 0; d < task.head_dim; d += kFloatTokens)
    with_count<kFloatTokens>(task.head_dim - d, [&]<int N>() {
      value_kernel<N>(scores, num_keys, block.values + d, block.stride, decay,
                      tile.sums + d * kLanes);
    });
}

}  // namespace

int flash_queries(int head_dim) {
  constexpr int kCacheFloats = 64 * 1024;  // half of a second-level cache
  return std::clamp(kCacheFloats / (2 * head_dim * kLanes), 1, 16) * kLanes;
}

void flash_attention(const FlashTask& task, Scratch& scratch) {
  const int tiles = ceil_div(task.last_query - task.first_query, kLanes);
  const std::ptrdiff_t stride = block_stride(task.head_dim);
  const size_t tile_floats = QueryTile::floats(task.head_dim);
  const size_t block_floats = kKeys * static_cast<size_t>(kLanes + 2 * stride);
  auto* scores = scratch.get<float>(block_floats + static_cast<size_t>(tiles) * tile_floats);
  KeyBlock block{scores + kKeys * kLanes, scores + kKeys * (kLanes + stride), stride, 0, 0};
  const auto tile_at = [&](int t) {
    return QueryTile::at(scores + block_floats + static_cast<size_t>(t) * tile_floats,
                         task.head_dim);
  };
  for (int t = 0; t < tiles; ++t) load_queries(task, task.first_query + t * kLanes, tile_at(t));
  const int last_key = task.causal ? std::min(task.num_keys, task.last_query) : task.num_keys;
  for (block.first = 0; block.first < last_key; block.first += kKeys) {
    block.count = std::min(kKeys, task.num_keys - block.first);
    load_keys(task, block);
    for (int t = 0; t < tiles; ++t) {
      const int first_query = task.first_query + t * kLanes;
      if (task.causal && block.first >= first_query + kLanes) continue;
      attend_block(task, first_query, block, tile_at(t), scores);
    }
  }
  for (int t = 0; t < tiles; ++t) store_outputs(task, task.first_query + t * kLanes, tile_at(t));
}

}  // namespace fuserve::FUSERVE_ISA
