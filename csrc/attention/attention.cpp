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

// scores[r][16] = queries[r] . keys for 16 tokens of a block.
template <int R, class T>
void score_kernel(const float* queries, int head_dim, int padded, const T* keys, float* scores) {
  F32x16 acc[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) acc[r] = zero();
  for (int d = 0; d < head_dim; ++d) {
    const F32x16 k = load16(keys + d * kBlockTokens);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) acc[r] = fma(k, set1(queries[r * padded + d]), acc[r]);
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) store16(scores + r * kBlockTokens, acc[r]);
}

// values[r][16] = values * decay[r] + weights[r] . V for 16 features.
template <int R, class T>
void value_kernel(const float* weights, const float* decay, int tokens, const T* v, int padded,
                  float* values) {
  F32x16 acc[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) acc[r] = mul(load16(values + r * padded), set1(decay[r]));
  for (int j = 0; j < tokens; ++j) {
    const F32x16 x = load16(v + j * padded);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) acc[r] = fma(x, set1(weights[r * kBlockTokens + j]), acc[r]);
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) store16(values + r * padded, acc[r]);
}

struct Mask {
  int first;  // first key of the block that the row sees
  int last;   // one past the last
};

// Turns one row's scores into exp(score - largest); updates the running maximum and sum. Returns
// the factor that earlier sums shrink by.
float softmax_row(float* scores, Mask mask, float& largest, float& sum) {
  F32x16 lo = load16(scores), hi = load16(scores + 16);
  if (mask.first > 0 || mask.last < kBlockTokens) {
    lo = keep(lo, mask.first, mask.last, kMinusInfinity);
    hi = keep(hi, mask.first - 16, mask.last - 16, kMinusInfinity);
  }
  const float now = std::max(largest, reduce_max(max(lo, hi)));
  // Before a row's first visible key everything is -inf; 0 avoids inf - inf.
  const F32x16 base = set1(now == kMinusInfinity ? 0.0F : now);
  const float decay = reduce_max(exp(sub(set1(largest), base)));
  lo = exp(sub(lo, base));
  hi = exp(sub(hi, base));
  store16(scores, lo);
  store16(scores + 16, hi);
  largest = now;
  sum = sum * decay + reduce_add(add(lo, hi));
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
                  const T* keys, const T* values, const float* queries, const Workspace& w,
                  const SoftmaxState& state) {
  const int padded = shape.padded_head_dim(), rows = task_rows(shape, task);
  const int heads = shape.heads_per_kv();
  for_row_tiles(rows, [&]<int R>(int row) {
    for (int half = 0; half < kBlockTokens; half += 16)
      score_kernel<R>(queries + row * padded, shape.head_dim, padded, keys + half,
                      w.scores + row * kBlockTokens + half);
  });
  const bool modified = shape.softcap > 0.0F || shape.alibi_slopes != nullptr;
  for (int row = 0; row < rows; ++row) {
    const int position = task.first_position + row / heads;
    float* scores = w.scores + row * kBlockTokens;
    if (modified)
      modify_row(shape, task.kv_head * heads + row % heads, position - first_key, scores);
    const Mask mask{task.window > 0 ? position - task.window + 1 - first_key : 0,
                    position + 1 - first_key};
    w.decay[row] = softmax_row(scores, mask, state.largest[row], state.sum[row]);
  }
  // Values past the task's last key are never read: they may be another request's remains.
  const int tokens = std::min(kBlockTokens, task.last_key() + 1 - first_key);
  for_row_tiles(rows, [&]<int R>(int row) {
    for (int d = 0; d < padded; d += 16)
      value_kernel<R>(w.scores + row * kBlockTokens, w.decay + row, tokens, values + d, padded,
                      state.values + row * padded + d);
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
  for (int block = first / kBlockTokens; block <= last / kBlockTokens; ++block) {
    const int physical = task.block_table[block];
    const T* keys = data + cache.k_offset(task.layer, physical, task.kv_head);
    const T* values = data + cache.v_offset(task.layer, physical, task.kv_head);
    const int first_key = block * kBlockTokens;
    if (rows <= kRowTile || std::is_same_v<T, float>) {
      attend_block(shape, task, first_key, keys, values, queries, w, state);
    } else {
      const size_t count = cache.head_elements();
      attend_block(shape, task, first_key, widened(keys, count, w.keys),
                   widened(values, count, w.values), queries, w, state);
    }
  }
}

}  // namespace

void SoftmaxState::clear(int rows, int padded_head_dim) const {
  std::fill_n(largest, rows, kMinusInfinity);
  std::fill_n(sum, rows, 0.0F);
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
    const F32x16 old_weight = exp(sub(set1(total.largest[row]), base));
    const F32x16 new_weight = exp(sub(set1(split.largest[row]), base));
    total.sum[row] =
        total.sum[row] * reduce_max(old_weight) + split.sum[row] * reduce_max(new_weight);
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
    const F32x16 inverse = set1(1.0F / total.sum[row]);
    const float* values = total.values + row * padded;
    float* target = out + row / heads * out_stride + row % heads * shape.head_dim;
    for (int d = 0; d < shape.head_dim; d += 16)
      store_n(target + d, mul(load16(values + d), inverse), std::min(16, shape.head_dim - d));
  }
}

}  // namespace fuserve::FUSERVE_ISA
