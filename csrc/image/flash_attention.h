// Attention over all tokens of an image or prompt, without a score matrix (Flash Attention, arXiv
// 2205.14135).
#pragma once

#include <algorithm>
#include <cstddef>

#include "runtime/buffer.h"

namespace fuserve::FUSERVE_ISA {

// One head's features of consecutive tokens, `stride` floats apart.
template <class T>
struct HeadRows {
  T* data = nullptr;
  std::ptrdiff_t stride = 0;

  T* row(int token) const { return data + token * stride; }
};

// The queries [first_query, last_query) of one head, against all its keys.
struct FlashTask {
  HeadRows<const float> queries, keys, values;
  HeadRows<float> out;
  int first_query = 0;
  int last_query = 0;
  int num_keys = 0;
  int head_dim = 0;
  bool causal = false;    // query i sees keys up to i
  bool in_pairs = false;  // products of pairs of 16 bits; never causal

  // Queries past the last repeat it.
  const float* query(int index) const { return queries.row(std::min(index, last_query - 1)); }
};

// Queries that one task should have: as many as share each read of a key, within a core's cache.
int flash_queries(int head_dim);

// out = softmax(q k^T / sqrt(head_dim)) v. Every output is summed over the keys in one order, so it
// does not depend on how queries are cut into tasks.
void flash_attention(const FlashTask& task, Scratch& scratch);

}  // namespace fuserve::FUSERVE_ISA
