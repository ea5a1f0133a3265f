// Attention over the paged KV cache, prefill and decode alike (FlashAttention's running softmax,
// arXiv 2205.14135; splits of the context merged as in Flash-Decoding).
#pragma once

#include <cstddef>

#include "attention/attention_types.h"
#include "runtime/buffer.h"
#include "simd/simd.h"

namespace fuserve::FUSERVE_ISA {

// Running softmax of `rows` queries: the largest score, the sums of exponentials in sixteen lanes,
// and the weighted sum of values, for each row.
struct SoftmaxState {
  float* values = nullptr;   // [rows][padded_head_dim]
  float* sums = nullptr;     // [rows][16]
  float* largest = nullptr;  // [rows]

  static size_t floats(int rows, int padded_head_dim) {
    return static_cast<size_t>(rows) * static_cast<size_t>(padded_head_dim + 16 + 1);
  }
  static SoftmaxState in(float* memory, int rows, int padded_head_dim) {
    const auto r = static_cast<size_t>(rows);
    float* sums = memory + r * static_cast<size_t>(padded_head_dim);
    return {memory, sums, sums + r * 16};
  }
  void clear(int rows, int padded_head_dim) const;
};

// The states of a task's KV heads, one after the other.
struct SoftmaxStates {
  float* memory = nullptr;
  int rows = 0;
  int padded_head_dim = 0;

  size_t floats() const { return SoftmaxState::floats(rows, padded_head_dim); }
  SoftmaxState of(int head) const {
    return SoftmaxState::in(memory + static_cast<size_t>(head) * floats(), rows, padded_head_dim);
  }
};

// Rows of a task in each KV head: token by token, its heads within.
inline int task_rows(const AttentionShape& shape, const AttentionTask& task) {
  return task.tokens * shape.heads_per_kv();
}

// Attends to the keys of one context split; `states` are overwritten.
void attend_split(const AttentionShape& shape, const KVCache& cache, const AttentionTask& task,
                  int split, SoftmaxStates states, Scratch& scratch);

// Adds a split's state to the total; splits are merged in ascending order.
void merge_split(int rows, int padded_head_dim, const SoftmaxState& split,
                 const SoftmaxState& total);

// Writes values / sum of one KV head to out[token][head][head_dim], from the task's first token and
// the KV head's first head.
void finish_attention(const AttentionShape& shape, const AttentionTask& task,
                      const SoftmaxState& total, float* out, std::ptrdiff_t out_stride);

}  // namespace fuserve::FUSERVE_ISA
