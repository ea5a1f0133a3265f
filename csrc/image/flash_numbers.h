// What flash attention multiplies: floats, or pairs of integers of 16 bits.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "image/flash_attention.h"
#include "linear/format.h"
#include "simd/products.h"

namespace fuserve::FUSERVE_ISA {

// The sixteen lanes are queries: then K and V are read where they lie, a value at a time, and a
// softmax is as many as there are lanes, without a sum or maximum across them. Only queries are
// transposed, once, and outputs back at the end.
inline constexpr int kLanes = 16;
inline constexpr int kKeys = 64;  // of a block, after which the running maximum is renewed

// exp2 instead of exp: its argument is divided by ln 2 in the queries, once.
inline float query_scale(int head_dim) {
  return 1.44269504F / std::sqrt(static_cast<float>(head_dim));
}

// The softmax of 16 queries over the keys so far.
struct Softmax {
  float* largest;  // [16]
  float* total;
};

// What a block's softmax leaves for its values.
struct Renewal {
  F32x16 decay;  // what earlier sums shrink by
  F32x16 unit;   // what a weight of 1 stands for beside the largest
};

// A block of keys and their values, in rows an odd number of cache lines apart: where they come
// from, rows may all share a few sets of the first-level cache.
template <typename Value>
struct KeyBlock {
  Value* keys;    // [count][features]
  Value* values;  // [count][head_dim], or of pairs of keys
  std::ptrdiff_t stride;
  int first;
  int count;
};

class FloatHeads {
 public:
  using Value = float;
  static constexpr int kPerValue = 1;  // features or keys that are multiplied together

  explicit FloatHeads(const FlashTask& task) : task_(task) {}

  // Query `first + lane` of each lane, in values of kPerValue features  # [features][16]
  void load_queries(int first, float* queries, float*) const {
    const float scale = query_scale(task_.head_dim);
    for (int lane = 0; lane < kLanes; ++lane) {
      const float* row = task_.query(first + lane);
      for (int d = 0; d < task_.head_dim; ++d) queries[d * kLanes + lane] = row[d] * scale;
    }
  }
  void load_keys(const KeyBlock<float>& block) {
    for (int key = 0; key < block.count; ++key) {
      const std::ptrdiff_t to = key * block.stride;
      std::copy_n(task_.keys.row(block.first + key), task_.head_dim, block.keys + to);
      std::copy_n(task_.values.row(block.first + key), task_.head_dim, block.values + to);
    }
  }
  static F32x16 score_unit(const float*) { return set1(1.0F); }
  static F32x16 score(F32x16 sums, F32x16) { return sums; }

  // Turns scores of a block into exp2(score - largest).
  static Renewal softmax(float* scores, int num_keys, F32x16, const Softmax& so_far) {
    const F32x16 before = load16(so_far.largest);
    F32x16 largest = before;
    for (int key = 0; key < num_keys; ++key) largest = max(load16(scores + key * kLanes), largest);
    const F32x16 decay = exp2<5>(sub(before, largest));
    F32x16 total = mul(load16(so_far.total), decay);
    for (int key = 0; key < num_keys; ++key) {
      const F32x16 weight = exp2<5>(sub(load16(scores + key * kLanes), largest));
      store16(scores + key * kLanes, weight);
      total = add(total, weight);
    }
    store16(so_far.largest, largest);
    store16(so_far.total, total);
    return {decay, set1(1.0F)};
  }
  static F32x16 begin(const float* sums, const Renewal& renewal) {
    return mul(load16(sums), renewal.decay);
  }
  static void end(F32x16 products, const Renewal&, float* sums) { store16(sums, products); }

 private:
  const FlashTask& task_;
};

// Queries are rounded to integers of one scale each, keys and values to those of one a block of
// them, and weights of the softmax beside the largest of their block: to 12 bits and more, as far
// as their sums fit 32. That is nothing beside what 8 bits do to what comes before, and twice as
// fast as floats.
class PairHeads {
 public:
  using Value = ShortPair;
  static constexpr int kPerValue = 2;

  explicit PairHeads(const FlashTask& task)
      : task_(task),
        largest_(std::min(
            32767.0F, std::floor(std::sqrt(2147483647.0F / static_cast<float>(task.head_dim))))) {}

  void load_queries(int first, ShortPair* queries, float* units) const {
    for (int lane = 0; lane < kLanes; ++lane) {
      const float* row = task_.query(first + lane);
      const float unit = unit_of(row, 0, 1, largest_);
      units[lane] = unit * query_scale(task_.head_dim);
      for (int d = 0; d < task_.head_dim; d += 2) {
        const auto at = [&](int i) {
          return i < task_.head_dim ? static_cast<std::int16_t>(std::lrint(row[i] / unit))
                                    : std::int16_t{0};
        };
        queries[d / 2 * kLanes + lane] = {at(d), at(d + 1)};
      }
    }
  }
  void load_keys(const KeyBlock<ShortPair>& block) {
    key_unit_ = unit_of(task_.keys.row(block.first), task_.keys.stride, block.count, largest_);
    for (int key = 0; key < block.count; ++key)
      round_row(task_.keys.row(block.first + key), 1.0F / key_unit_,
                block.keys + key * block.stride);
    value_unit_ =
        unit_of(task_.values.row(block.first), task_.values.stride, block.count, kLargestValue);
    const F32x16 inverse = set1(1.0F / value_unit_);
    for (int key = 0; key < block.count; key += 2) {
      const float* first = task_.values.row(block.first + key);
      // The last of an odd number has a neighbour whose weight is 0.
      const float* second = key + 1 < block.count ? task_.values.row(block.first + key + 1) : first;
      ShortPair* to = block.values + key / 2 * block.stride;
      for (int d = 0; d < task_.head_dim; d += 16)
        store16(to + d, pairs(rounded(first, d, inverse), rounded(second, d, inverse)));
    }
  }
  F32x16 score_unit(const float* units) const { return mul(load16(units), set1(key_unit_)); }
  static F32x16 score(I32x16 sums, F32x16 unit) { return mul(to_float(sums), unit); }

  // Turns scores of a block into pairs of 2^kWeightBits * exp2(score - the largest of the block).
  Renewal softmax(float* scores, int num_keys, F32x16 unit, const Softmax& so_far) const {
    F32x16 peak = load16(scores);
    for (int key = 1; key < num_keys; ++key) peak = max(load16(scores + key * kLanes), peak);
    const F32x16 before = load16(so_far.largest), largest = max(peak, before);
    const F32x16 decay = exp2<5>(sub(before, largest)), share = exp2<5>(sub(peak, largest));
    const F32x16 offset = sub(set1(kWeightBits), peak);
    F32x16 total = zero();
    const auto weight = [&](int key) {
      if (key >= num_keys) return set1_i32(0);
      const F32x16 w = exp2<3>(add(load16(scores + key * kLanes), offset));
      total = add(total, w);
      return to_int(w);
    };
    for (int key = 0; key < num_keys; key += 2) {
      const I32x16 first = weight(key);
      store16(reinterpret_cast<ShortPair*>(scores + key / 2 * kLanes),
              pairs(first, weight(key + 1)));
    }
    store16(so_far.largest, largest);
    // The weights are finite even of a NaN; the unit of its scores is not.
    const F32x16 decay_or_nan = fma(unit, zero(), decay);
    store16(so_far.total, fma(total, share, mul(load16(so_far.total), decay_or_nan)));
    return {decay_or_nan, mul(share, set1(value_unit_))};
  }
  static I32x16 begin(const float*, const Renewal&) { return set1_i32(0); }
  static void end(I32x16 products, const Renewal& renewal, float* sums) {
    store16(sums, fma(to_float(products), renewal.unit, mul(load16(sums), renewal.decay)));
  }

 private:
  // 64 products of the largest weight and value are within 32 bits.
  static constexpr float kWeightBits = 12.0F;
  static constexpr float kLargestValue = 8191.0F;

  I32x16 rounded(const float* row, int d, F32x16 inverse) const {
    const int n = task_.head_dim - d;
    return to_int(mul(n >= 16 ? load16(row + d) : load_n(row + d, n), inverse));
  }
  // out: [head_dim, padded to 16]
  void round_row(const float* row, float inverse, ShortPair* out) const {
    for (int d = 0; d < task_.head_dim; d += 16)
      store_i16(out + d / 2, rounded(row, d, set1(inverse)));
  }
  // What 1 stands for if the largest of the rows' magnitudes is `most`; NaN with a NaN or infinity.
  float unit_of(const float* row, std::ptrdiff_t stride, int rows, float most) const {
    F32x16 largest = set1(std::numeric_limits<float>::min()), poison = zero();
    for (int i = 0; i < rows; ++i, row += stride)
      for (int d = 0; d < task_.head_dim; d += 16) {
        const int n = task_.head_dim - d;
        const F32x16 x = n >= 16 ? load16(row + d) : load_n(row + d, n);
        largest = max(largest, abs(x));
        poison = fma(x, zero(), poison);
      }
    return reduce_max(largest) / most + reduce_add(poison);
  }

  const FlashTask& task_;
  const float largest_;
  float key_unit_ = 0.0F;
  float value_unit_ = 0.0F;
};

}  // namespace fuserve::FUSERVE_ISA
