#include "attention/attention.h"

#include <algorithm>
#include <limits>
#include <type_traits>

#include "attention/nibbles.h"

namespace fuserve::FUSERVE_ISA {
namespace {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

// Queries that share a load of keys or values in registers.
constexpr int kRowTile = 6;

template <class F>
void for_row_tiles(int rows, F&& f) {
  int row = 0;
  for (; row + kRowTile <= rows; row += kRowTile) f.template operator()<kRowTile>(row);
  switch (rows - row) {
    case 5:
      return f.template operator()<5>(row);
    case 4:
      return f.template operator()<4>(row);
    case 3:
      return f.template operator()<3>(row);
    case 2:
      return f.template operator()<2>(row);
    case 1:
      return f.template operator()<1>(row);
    default:
      return;
  }
}

// Calls turn(i) for i in [0, count). With each call, as many bytes are fetched from `next` as a
// turn reads, so evenly that no two lines follow each other closely: only so many can be on their
// way to a core, and prefetches that find no room stall it. Null fetches nothing.
template <std::ptrdiff_t Bytes, class F>
void in_turns(int count, const char* next, F&& turn) {
  constexpr int kUnrolled = 4;
  int i = 0;
  for (; i + kUnrolled <= count; i += kUnrolled) {
#pragma GCC unroll 4
    for (int j = 0; j < kUnrolled; ++j) {
      if (next != nullptr && j * Bytes % 64 == 0)
        for (std::ptrdiff_t line = 0; line < Bytes; line += 64) prefetch(next + j * Bytes + line);
      turn(i + j);
    }
    if (next != nullptr) next += kUnrolled * Bytes;
  }
  for (; i < count; ++i) turn(i);
}

// scores[r][H * 16] = queries[r] . keys for H * 16 tokens of a block.
template <int R, int H, class T>
void score_kernel(const float* queries, int head_dim, int padded, const T* keys, const char* next,
                  float* scores) {
  F32x16 acc[R][H];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int h = 0; h < H; ++h) acc[r][h] = zero();
  in_turns<16 * H * sizeof(T)>(head_dim, next, [&](int d) {
    F32x16 k[H];
#pragma GCC unroll 2
    for (int h = 0; h < H; ++h) k[h] = load16(keys + d * kBlockTokens + 16 * h);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const F32x16 q = set1(queries[r * padded + d]);
#pragma GCC unroll 2
      for (int h = 0; h < H; ++h) acc[r][h] = fma(k[h], q, acc[r][h]);
    }
  });
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int h = 0; h < H; ++h) store16(scores + r * kBlockTokens + 16 * h, acc[r][h]);
}

// values[r][H * 16] = values * decay[r] + weights[r] . V for H * 16 features.
template <int R, int H, class T>
void value_kernel(const float* weights, const float* decay, int tokens, const T* v, int padded,
                  const char* next, float* values) {
  F32x16 acc[R][H];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int h = 0; h < H; ++h)
      acc[r][h] = mul(load16(values + r * padded + 16 * h), set1(decay[r]));
  in_turns<16 * H * sizeof(T)>(tokens, next, [&](int j) {
    F32x16 x[H];
#pragma GCC unroll 2
    for (int h = 0; h < H; ++h) x[h] = load16(v + j * padded + 16 * h);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const F32x16 w = set1(weights[r * kBlockTokens + j]);
#pragma GCC unroll 2
      for (int h = 0; h < H; ++h) acc[r][h] = fma(x[h], w, acc[r][h]);
    }
  });
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int h = 0; h < H; ++h) store16(values + r * padded + 16 * h, acc[r][h]);
}

struct Mask {
  int first;  // first key of the block that the row sees
  int last;   // one past the last
};

// What earlier sums shrink by when the largest score rises from `before` to `now`: exactly 1 if it
// does not, 0 if there was none. `base` is `now`, or 0 while no key was visible.
float decay_of(float before, float now, F32x16 base) {
  return before == now ? 1.0F : first_lane(exp(sub(set1(before), base)));
}

// Turns one row's scores into exp(score - largest); updates the running maximum and sums. Returns
// the factor that earlier sums shrink by.
float softmax_row(float* scores, Mask mask, float& largest, float* sums) {
  F32x16 lo = load16(scores), hi = load16(scores + 16);
  if (mask.first > 0 || mask.last < kBlockTokens) {
    lo = keep(lo, mask.first, mask.last, kMinusInfinity);
    hi = keep(hi, mask.first - 16, mask.last - 16, kMinusInfinity);
  }
  const float now = std::max(largest, reduce_max(max(lo, hi)));
  // Before a row's first visible key everything is -inf; 0 avoids inf - inf.
  const F32x16 base = set1(now == kMinusInfinity ? 0.0F : now);
  const float decay = decay_of(largest, now, base);
  lo = exp(sub(lo, base));
  hi = exp(sub(hi, base));
  store16(scores, lo);
  store16(scores + 16, hi);
  store16(sums, fma(load16(sums), set1(decay), add(lo, hi)));
  largest = now;
  return decay;
}

// Soft-cap and ALiBi bias of one row's scores.
void modify_row(const AttentionShape& shape, int head, int distance, float* scores) {
  for (int half = 0; half < kBlockTokens; half += 16) {
    F32x16 s = load16(scores + half);
    if (shape.softcap > 0.0F) s = mul(set1(shape.softcap), tanh(div(s, set1(shape.softcap))));
    if (shape.alibi_slopes != nullptr) {
      constexpr float lanes[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
      const F32x16 relative = add(load16(lanes), set1(static_cast<float>(half - distance)));
      s = fma(relative, set1(shape.alibi_slopes[head]), s);
    }
    store16(scores + half, s);
  }
}

void scale_by(float* row, const float* scales) {
  for (int i = 0; i < kBlockTokens; i += 16)
    store16(row + i, mul(load16(row + i), load16(scales + i)));
}

// Blocks [first, last] of a sequence.
struct BlockSpan {
  int first;
  int last;
};

struct Workspace {
  float* queries;      // [rows][padded]
  float* scores;       // [rows][32]
  float* decay;        // [rows]
  float* keys;         // [padded][32], widened
  float* values;       // [32][padded], widened
  std::int8_t* bytes;  // [2][padded * 32], unpacked from nibbles
};

Workspace workspace(int rows, int padded, Scratch& scratch) {
  const auto r = static_cast<size_t>(rows), p = static_cast<size_t>(padded);
  auto* memory = scratch.get<float>(r * (p + kBlockTokens + 1) + 3 * p * kBlockTokens);
  Workspace w{};
  w.queries = memory;
  w.scores = w.queries + r * p;
  w.decay = w.scores + r * kBlockTokens;
  w.keys = w.decay + r;
  w.values = w.keys + p * kBlockTokens;
  w.bytes = reinterpret_cast<std::int8_t*>(w.values + p * kBlockTokens);
  return w;
}

template <class T>
void widen(const T* source, size_t count, float* out) {
  for (size_t i = 0; i < count; i += 16) store16(out + i, load16(source + i));
}

// One KV head of one block as a task sees it.
template <class T>
struct BlockView {
  const T* keys;
  const T* values;
  const float* key_scales;    // null: none
  const float* value_scales;  // null: none
  int kv_head;
  int first_key;               // the position of the block's first token
  const char* next = nullptr;  // the head that comes next from memory; null: nothing is fetched
};

template <class T>
void attend_block(const AttentionShape& shape, const AttentionTask& task, const BlockView<T>& block,
                  const float* queries, const Workspace& w, const SoftmaxState& state) {
  const int padded = shape.padded_head_dim(), rows = task_rows(shape, task);
  const int heads = shape.heads_per_kv();
  // Each pass over a part of K or V fetches as large a part of the next one's.
  const auto next_part = [&](int row, std::ptrdiff_t element) {
    return block.next == nullptr || row > 0
               ? nullptr
               : block.next + element * static_cast<std::ptrdiff_t>(sizeof(T));
  };
  constexpr int kTokens = 16 * kTilesAtOnce;
  for_row_tiles(rows, [&]<int R>(int row) {
    for (int token = 0; token < kBlockTokens; token += kTokens)
      score_kernel<R, kTilesAtOnce>(queries + row * padded, shape.head_dim, padded,
                                    block.keys + token, next_part(row, token * padded),
                                    w.scores + row * kBlockTokens + token);
  });
  const bool modified = shape.softcap > 0.0F || shape.alibi_slopes != nullptr;
  for (int row = 0; row < rows; ++row) {
    const int position = task.first_position + row / heads;
    float* scores = w.scores + row * kBlockTokens;
    if (block.key_scales != nullptr) scale_by(scores, block.key_scales);
    if (modified)
      modify_row(shape, block.kv_head * heads + row % heads, position - block.first_key, scores);
    const Mask mask{task.window > 0 ? position - task.window + 1 - block.first_key : 0,
                    position + 1 - block.first_key};
    w.decay[row] = softmax_row(scores, mask, state.largest[row], state.sums + 16 * row);
    if (block.value_scales != nullptr) scale_by(scores, block.value_scales);
  }
  // Values past the task's last key are never read: they may be another request's remains.
  const int tokens = std::min(kBlockTokens, task.last_key() + 1 - block.first_key);
  for_row_tiles(rows, [&]<int R>(int row) {
    const float* weights = w.scores + row * kBlockTokens;
    float* out = state.values + row * padded;
    const auto run = [&]<int H>(int d) {
      value_kernel<R, H>(weights, w.decay + row, tokens, block.values + d, padded,
                         next_part(row, (padded + d) * kBlockTokens), out + d);
    };
    int d = 0;
    for (; d + 16 * kTilesAtOnce <= padded; d += 16 * kTilesAtOnce)
      run.template operator()<kTilesAtOnce>(d);
    for (; d < padded; d += 16) run.template operator()<1>(d);
  });
}

// A token's queries go at the pace of memory: every head of a block, then the next block, which is
// one stream through the cache, fetched ahead.
template <class T>
void attend_few_rows(const AttentionShape& shape, const KVCache& cache, const AttentionTask& task,
                     BlockSpan span, SoftmaxStates states, const Workspace& w) {
  const int row_floats = shape.heads_per_kv() * shape.padded_head_dim();
  const int count = (span.last + 1 - span.first) * task.num_kv_heads;
  const auto block_of = [&](int i) { return span.first + i / task.num_kv_heads; };
  const auto kv_head_of = [&](int i) { return task.first_kv_head + i % task.num_kv_heads; };
  for (int i = 0; i < count; ++i) {
    const int ahead = std::min(i + 1, count - 1);
    const CachedHead<T> head(cache, task.layer, task.block_table[block_of(i)], kv_head_of(i));
    const auto* next = reinterpret_cast<const char*>(
        cache.head(task.layer, task.block_table[block_of(ahead)], kv_head_of(ahead)));
    const int h = i % task.num_kv_heads;
    const auto attend = [&]<class Stored>(const Stored* keys, const Stored* values,
                                          const char* fetched) {
      const BlockView<Stored> view{keys,
                                   values,
                                   head.key_scales,
                                   head.value_scales,
                                   kv_head_of(i),
                                   block_of(i) * kBlockTokens,
                                   fetched};
      attend_block<Stored>(shape, task, view, task.queries + h * row_floats, w, states.of(h));
    };
    if constexpr (std::is_same_v<T, Nibbles>) {
      unpack_head(head, cache.padded_head_dim, next, w.bytes);
      attend(w.bytes, w.bytes + cache.head_elements(), nullptr);
    } else {
      attend(head.keys, head.values, next);
    }
  }
}

// Many rows go at the pace of arithmetic: head by head, widened once for all rows.
template <class T>
void attend_many_rows(const AttentionShape& shape, const KVCache& cache, const AttentionTask& task,
                      BlockSpan span, SoftmaxStates states, const Workspace& w) {
  const int row_floats = shape.heads_per_kv() * shape.padded_head_dim();
  const size_t count = cache.head_elements();
  for (int h = 0; h < task.num_kv_heads; ++h) {
    for (int t = 0; t < task.tokens; ++t)
      std::copy_n(task.queries + t * task.query_stride + h * row_floats, row_floats,
                  w.queries + t * row_floats);
    for (int block = span.first; block <= span.last; ++block) {
      const int kv_head = task.first_kv_head + h;
      const CachedHead<T> head(cache, task.layer, task.block_table[block], kv_head);
      BlockView<float> view{
          w.keys, w.values, head.key_scales, head.value_scales, kv_head, block * kBlockTokens};
      if constexpr (std::is_same_v<T, float>) {
        view.keys = head.keys;
        view.values = head.values;
      } else if constexpr (std::is_same_v<T, Nibbles>) {
        unpack_head(head, cache.padded_head_dim, nullptr, w.bytes);
        widen(w.bytes, count, w.keys);
        widen(w.bytes + count, count, w.values);
      } else {
        widen(head.keys, count, w.keys);
        widen(head.values, count, w.values);
      }
      attend_block<float>(shape, task, view, w.queries, w, states.of(h));
    }
  }
}

template <class T>
void attend_split_typed(const AttentionShape& shape, const KVCache& cache,
                        const AttentionTask& task, int split, SoftmaxStates states,
                        Scratch& scratch) {
  const int rows = task_rows(shape, task);
  const Workspace w = workspace(rows, shape.padded_head_dim(), scratch);
  for (int h = 0; h < task.num_kv_heads; ++h) states.of(h).clear(rows, shape.padded_head_dim());
  const BlockSpan span{std::max(split * kSplitTokens, task.first_key()) / kBlockTokens,
                       std::min((split + 1) * kSplitTokens - 1, task.last_key()) / kBlockTokens};
  if (task.tokens == 1 && rows <= 2 * kRowTile)
    attend_few_rows<T>(shape, cache, task, span, states, w);
  else
    attend_many_rows<T>(shape, cache, task, span, states, w);
}

}  // namespace

void SoftmaxState::clear(int rows, int padded_head_dim) const {
  std::fill_n(largest, rows, kMinusInfinity);
  std::fill_n(sums, 16 * rows, 0.0F);
  std::fill_n(values, rows * padded_head_dim, 0.0F);
}

void attend_split(const AttentionShape& shape, const KVCache& cache, const AttentionTask& task,
                  int split, SoftmaxStates states, Scratch& scratch) {
  switch (cache.type) {
    case CacheType::f32:
      return attend_split_typed<float>(shape, cache, task, split, states, scratch);
    case CacheType::f16:
      return attend_split_typed<Half>(shape, cache, task, split, states, scratch);
    case CacheType::i8:
      return attend_split_typed<std::int8_t>(shape, cache, task, split, states, scratch);
    case CacheType::i4:
      return attend_split_typed<Nibbles>(shape, cache, task, split, states, scratch);
  }
}

void merge_split(int rows, int padded_head_dim, const SoftmaxState& split,
                 const SoftmaxState& total) {
  for (int row = 0; row < rows; ++row) {
    const float now = std::max(total.largest[row], split.largest[row]);
    const F32x16 base = set1(now == kMinusInfinity ? 0.0F : now);
    const F32x16 old_weight = set1(decay_of(total.largest[row], now, base));
    const F32x16 new_weight = set1(decay_of(split.largest[row], now, base));
    float* sums = total.sums + 16 * row;
    store16(sums, fma(load16(split.sums + 16 * row), new_weight, mul(load16(sums), old_weight)));
    total.largest[row] = now;
    float* values = total.values + row * padded_head_dim;
    const float* added = split.values + row * padded_head_dim;
    for (int d = 0; d < padded_head_dim; d += 16)
      store16(values + d, fma(load16(added + d), new_weight, mul(load16(values + d), old_weight)));
  }
}

void finish_attention(const AttentionShape& shape, const AttentionTask& task,
                      const SoftmaxState& total, float* out, std::ptrdiff_t out_stride) {
  const int padded = shape.padded_head_dim(), heads = shape.heads_per_kv();
  for (int row = 0; row < task_rows(shape, task); ++row) {
    const F32x16 inverse = set1(1.0F / reduce_add(load16(total.sums + 16 * row)));
    const float* values = total.values + row * padded;
    float* target = out + row / heads * out_stride + row % heads * shape.head_dim;
    for (int d = 0; d < shape.head_dim; d += 16)
      store_n(target + d, mul(load16(values + d), inverse), std::min(16, shape.head_dim - d));
  }
}

}  // namespace fuserve::FUSERVE_ISA
