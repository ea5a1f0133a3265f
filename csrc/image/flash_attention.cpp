#include "image/flash_attention.h"

#include <algorithm>
#include <limits>

#include "image/flash_numbers.h"
#include "linear/format.h"
#include "linear/tiles.h"
#include "simd/products.h"

namespace fuserve::FUSERVE_ISA {
namespace {

// Queries of one head, a block of keys at a time.
template <class Numbers>
class FlashHead {
 public:
  using Value = typename Numbers::Value;

  FlashHead(const FlashTask& task, Scratch& scratch);
  void run();

 private:
  // 16 queries and their sums, [features][16] each.
  struct Tile {
    Value* queries;
    float* units;
    float* sums;
    Softmax softmax;
  };

  Tile tile(int index) const {
    float* memory = tiles_ + static_cast<size_t>(index) * tile_floats();
    float* sums = memory + task_.head_dim * kLanes;
    float* units = sums + task_.head_dim * kLanes;
    return {reinterpret_cast<Value*>(memory), units, sums, {units + kLanes, units + 2 * kLanes}};
  }
  size_t tile_floats() const { return static_cast<size_t>((2 * task_.head_dim + 3) * kLanes); }
  int features() const { return ceil_div(task_.head_dim, Numbers::kPerValue); }

  void begin(int first, const Tile& tile) const;
  void attend(int first_query, const Tile& tile);
  template <int N>
  void score(const Tile& tile, F32x16 unit, const Value* keys, float* scores) const;
  template <int N>
  void add_values(const Value* values, const Renewal& renewal, float* sums) const;
  void finish(int first, const Tile& tile) const;

  const FlashTask& task_;
  Numbers numbers_;
  KeyBlock<Value> block_;
  float* scores_;  // [kKeys][16]; then weights
  float* tiles_;
};

template <class Numbers>
FlashHead<Numbers>::FlashHead(const FlashTask& task, Scratch& scratch)
    : task_(task), numbers_(task) {
  static_assert(sizeof(Value) == sizeof(float));
  const std::ptrdiff_t stride = (ceil_div(task.head_dim, 16) | 1) * 16;
  const int tiles = ceil_div(task.last_query - task.first_query, kLanes);
  const size_t block_floats = kKeys * static_cast<size_t>(kLanes + 2 * stride);
  scores_ = scratch.get<float>(block_floats + static_cast<size_t>(tiles) * tile_floats());
  auto* keys = reinterpret_cast<Value*>(scores_ + kKeys * kLanes);
  block_ = {keys, keys + kKeys * stride, stride, 0, 0};
  tiles_ = scores_ + block_floats;
}

template <class Numbers>
void FlashHead<Numbers>::run() {
  const int tiles = ceil_div(task_.last_query - task_.first_query, kLanes);
  for (int t = 0; t < tiles; ++t) begin(task_.first_query + t * kLanes, tile(t));
  const int last_key = task_.causal ? std::min(task_.num_keys, task_.last_query) : task_.num_keys;
  for (block_.first = 0; block_.first < last_key; block_.first += kKeys) {
    block_.count = std::min(kKeys, task_.num_keys - block_.first);
    numbers_.load_keys(block_);
    for (int t = 0; t < tiles; ++t) {
      const int first_query = task_.first_query + t * kLanes;
      if (task_.causal && block_.first >= first_query + kLanes) continue;
      attend(first_query, tile(t));
    }
  }
  for (int t = 0; t < tiles; ++t) finish(task_.first_query + t * kLanes, tile(t));
}

template <class Numbers>
void FlashHead<Numbers>::begin(int first, const Tile& tile) const {
  numbers_.load_queries(first, tile.queries, tile.units);
  std::fill_n(tile.sums, task_.head_dim * kLanes, 0.0F);
  store16(tile.softmax.largest, set1(-std::numeric_limits<float>::infinity()));
  store16(tile.softmax.total, zero());
}

template <class Numbers>
void FlashHead<Numbers>::attend(int first_query, const Tile& tile) {
  const F32x16 unit = numbers_.score_unit(tile.units);
  for (int key = 0; key < block_.count; key += kFloatTokens)
    with_count<kFloatTokens>(block_.count - key, [&]<int N>() {
      score<N>(tile, unit, block_.keys + key * block_.stride, scores_ + key * kLanes);
    });
  if (task_.causal)
    for (int key = std::max(0, first_query + 1 - block_.first); key < block_.count; ++key) {
      const F32x16 visible = keep(load16(scores_ + key * kLanes), block_.first + key - first_query,
                                  kLanes, -std::numeric_limits<float>::infinity());
      store16(scores_ + key * kLanes, visible);
    }
  const Renewal renewal = numbers_.softmax(scores_, block_.count, unit, tile.softmax);
  for (int d = 0; d < task_.head_dim; d += kFloatTokens)
    with_count<kFloatTokens>(task_.head_dim - d, [&]<int N>() {
      add_values<N>(block_.values + d, renewal, tile.sums + d * kLanes);
    });
}

// scores[key][lane] of N keys.
template <class Numbers>
template <int N>
void FlashHead<Numbers>::score(const Tile& tile, F32x16 unit, const Value* keys,
                               float* scores) const {
  typename Products<Value>::Sums acc[N];
  const std::ptrdiff_t stride = block_.stride;
#pragma GCC unroll 16
  for (int n = 0; n < N; ++n) acc[n] = Products<Value>::none();
  const int last = features();
  // Unrolled, the loop's end is predicted: with 40 features 65 to 71 GFLOP/s instead of 52 to 60.
#pragma GCC unroll 4
  for (int d = 0; d < last; ++d) {
    const auto q = load16(tile.queries + d * kLanes);
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) acc[n] = fma(q, set1(keys[n * stride + d]), acc[n]);
  }
#pragma GCC unroll 16
  for (int n = 0; n < N; ++n) store16(scores + n * kLanes, Numbers::score(acc[n], unit));
}

// sums[d][lane] = sums * decay + weights[key][lane] . values[key][d] for N features.
template <class Numbers>
template <int N>
void FlashHead<Numbers>::add_values(const Value* values, const Renewal& renewal,
                                    float* sums) const {
  typename Products<Value>::Sums acc[N];
#pragma GCC unroll 16
  for (int n = 0; n < N; ++n) acc[n] = Numbers::begin(sums + n * kLanes, renewal);
  const auto* weights = reinterpret_cast<const Value*>(scores_);
  const int last = ceil_div(block_.count, Numbers::kPerValue);
#pragma GCC unroll 4
  for (int key = 0; key < last; ++key, values += block_.stride) {
    const auto w = load16(weights + key * kLanes);
#pragma GCC unroll 16
    for (int n = 0; n < N; ++n) acc[n] = fma(w, set1(values[n]), acc[n]);
  }
#pragma GCC unroll 16
  for (int n = 0; n < N; ++n) Numbers::end(acc[n], renewal, sums + n * kLanes);
}

template <class Numbers>
void FlashHead<Numbers>::finish(int first, const Tile& tile) const {
  const F32x16 inverse = div(set1(1.0F), load16(tile.softmax.total));
  for (int d = 0; d < task_.head_dim; ++d)
    store16(tile.sums + d * kLanes, mul(load16(tile.sums + d * kLanes), inverse));
  for (int lane = 0; lane < std::min(kLanes, task_.last_query - first); ++lane) {
    float* row = task_.out.row(first + lane);
    for (int d = 0; d < task_.head_dim; ++d) row[d] = tile.sums[d * kLanes + lane];
  }
}

}  // namespace

int flash_queries(int head_dim) {
  constexpr int kCacheFloats = 64 * 1024;  // half of a second-level cache
  return std::clamp(kCacheFloats / (2 * head_dim * kLanes), 1, 16) * kLanes;
}

void flash_attention(const FlashTask& task, Scratch& scratch) {
  if (task.in_pairs)
    FlashHead<PairHeads>(task, scratch).run();
  else
    FlashHead<FloatHeads>(task, scratch).run();
}

}  // namespace fuserve::FUSERVE_ISA
