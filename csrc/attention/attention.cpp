#include "attention/attention.h"

#include <algorithm>
#include <limits>

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

// scores[r][H * 16] = queries[r] . keys for H * 16 tokens of a block. `next` is fetched from memory
// meanwhile, `next_step` bytes with each feature.
template <int R, int H, class T>
void score_kernel(const float* queries, int head_dim, int padded, const T* keys, const char* next,
                  std::ptrdiff_t next_step, float* scores) {
  F32x16 acc[R][H];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int h = 0; h < H; ++h) acc[r][h] = zero();
  for (int d = 0; d < head_dim; ++d) {
    for (std::ptrdiff_t line = 0; line < next_step; line += 64) prefetch(next + line);
    next += next_step;
    F32x16 k[H];
#pragma GCC unroll 2
    for (int h = 0; h < H; ++h) k[h] = load16(keys + d * kBlockTokens + 16 * h);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const F32x16 q = set1(queries[r * padded + d]);
#pragma GCC unroll 2
      for (int h = 0; h < H; ++h) acc[r][h] = fma(k[h], q, acc[r][h]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int h = 0; h < H; ++h) store16(scores + r * kBlockTokens + 16 * h, acc[r][h]);
}

// values[r][H * 16] = values * decay[r] + weights[r] . V for H * 16 features.
template <int R, int H, class T>
void value_kernel(const float* weights, const float* decay, int tokens, const T* v, int padded,
                  float* values) {
  F32x16 acc[R][H];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int h = 0; h < H; ++h)
      acc[r][h] = mul(load16(values + r * padded + 16 * h), set1(decay[r]));
  for (int j = 0; j < tokens; ++j) {
    F32x16 x[H];
#pragma GCC unroll 2
    for (int h = 0; h < H; ++h) x[h] = load16(v + j * padded + 16 * h);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const F32x16 w = set1(weights[r * kBlockTokens + j]);
#pragma GCC unroll 2
      for (int h = 0; h < H; ++h) acc[r][h] = fma(x[h], w, acc[r][h]);
    }
  }
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

struct Workspace {
  float* queries;  // [rows][padded]
  float* scores;   // [rows][32]
  float* decay;    // [rows]
  float* keys;     // [padded][32], widened
  float* values;   // [32][padded], widened
};

Workspace workspace(int rows, int padded, Scratch& scratch) {
  const auto r = static_cast<size_t>(rows), p = static_cast<size_t>(padded);
  auto* memory = scratch.get<float>(r * (p + kBlockTokens + 1) + 2 * p * kBlockTokens);
  Workspace w{};
  w.queries = memory;
  w.scores = w.queries + r * p;
  w.decay = w.scores + r * kBlockTokens;
  w.keys = w.decay + r;
  w.values = w.keys + p * kBlockTokens;
  return w;
}

template <class T>
const float* widened(const T* source, size_t count, float* out) {
  for (size_t i = 0; i < count; i += 16) store16(out + i, load16(source + i));
  return out;
}

template <class T>
void attend_block(const AttentionShape& shape, const AttentionTask& task, int first_key,
                  const T* keys, const T* values, const char* next, std::ptrdiff_t next_step,
                  const float* queries, const Workspace& w, const SoftmaxState& state) {
  const int padded = shape.padded_head_dim(), rows = task_rows(shape, task);
  const int heads = shape.heads_per_kv();
  for_row_tiles(rows, [&]<int R>(int row) {
    for (int token = 0; token < kBlockTokens; token += 16 * kTilesAtOnce) {
      score_kernel<R, kTilesAtOnce>(queries + row * padded, shape.head_dim, padded, keys + token,
                                    next, next_step, w.scores + row * kBlockTokens + token);
      next_step = 0;
    }
  });
  const bool modified = shape.softcap > 0.0F || shape.alibi_slopes != nullptr;
  for (int row = 0; row < rows; ++row) {
    const int position = task.first_position + row / heads;
    float* scores = w.scores + row * kBlockTokens;
    if (modified)
      modify_row(shape, task.kv_head * heads + row % heads, position - first_key, scores);
    const Mask mask{task.window > 0 ? position - task.window + 1 - first_key : 0,
                    position + 1 - first_key};
    w.decay[row] = softmax_row(scores, mask, state.largest[row], state.sums + 16 * row);
  }
  // Values past the task's last key are never read: they may be another request's remains.
  const int tokens = std::min(kBlockTokens, task.last_key() + 1 - first_key);
  for_row_tiles(rows, [&]<int R>(int row) {
    const float* weights = w.scores + row * kBlockTokens;
    float* out = state.values + row * padded;
    int d = 0;
    for (; d + 16 * kTilesAtOnce <= padded; d += 16 * kTilesAtOnce)
      value_kernel<R, kTilesAtOnce>(weights, w.decay + row, tokens, values + d, padded, out + d);
    for (; d < padded; d += 16)
      value_kernel<R, 1>(weights, w.decay + row, tokens, values + d, padded, out + d);
  });
}

template <class T>
void attend_split_typed(const AttentionShape& shape, const KVCache& cache,
                        const AttentionTask& task, int split, const SoftmaxState& state,
                        Scratch& scratch) {
  const int padded = shape.padded_head_dim(), rows = task_rows(shape, task);
  const int heads = shape.heads_per_kv();
  const Workspace w = workspace(rows, padded, scratch);
  state.clear(rows, padded);
  const float* queries = task.queries;
  if (task.tokens > 1) {
    for (int t = 0; t < task.tokens; ++t)
      std::copy_n(task.queries + t * task.query_stride, heads * padded,
                  w.queries + t * heads * padded);
    queries = w.queries;
  }
  const int first = std::max(split * kSplitTokens, task.first_key());
  const int last = std::min((split + 1) * kSplitTokens - 1, task.last_key());
  const T* data = static_cast<const T*>(cache.data);
  const size_t count = cache.head_elements();
  const int last_block = last / kBlockTokens;
  for (int block = first / kBlockTokens; block <= last_block; ++block) {
    const T* keys = data + cache.k_offset(task.layer, task.block_table[block], task.kv_head);
    const T* values = keys + count;
    const int first_key = block * kBlockTokens;
    if (rows <= kRowTile) {
      // The pace is memory's: fetch the next block's keys and values, which lie together.
      const int next = task.block_table[std::min(block + 1, last_block)];
      const auto* fetched =
          reinterpret_cast<const char*>(data + cache.k_offset(task.layer, next, task.kv_head));
      constexpr std::ptrdiff_t kStep = 2 * kBlockTokens * sizeof(T);
      attend_block(shape, task, first_key, keys, values, fetched, kStep, queries, w, state);
    } else if constexpr (std::is_same_v<T, float>) {
      attend_block(shape, task, first_key, keys, values, nullptr, 0, queries, w, state);
    } else {
      attend_block(shape, task, first_key, widened(keys, count, w.keys),
                   widened(values, count, w.values), nullptr, 0, queries, w, state);
    }
  }
}

}  // namespace

void SoftmaxState::clear(int rows, int padded_head_dim) const {
  std::fill_n(largest, rows, kMinusInfinity);
  std::fill_n(sums, 16 * rows, 0.0F);
  std::fill_n(values, rows * padded_head_dim, 0.0F);
}

void attend_split(const AttentionShape& shape, const KVCache& cache, const AttentionTask& task,
                  int split, const SoftmaxState& state, Scratch& scratch) {
  if (cache.half)
    attend_split_typed<Half>(shape, cache, task, split, state, scratch);
  else
    attend_split_typed<float>(shape, cache, task, split, state, scratch);
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
