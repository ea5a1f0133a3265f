// Small sets of likely tokens, selected without sorting the vocabulary.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "sampling/row.h"

namespace fuserve::sampling {

struct Candidate {
  float logit;
  std::int32_t token;
};

// Descending logit; the lower token id first among equals.
inline bool more_likely(const Candidate& a, const Candidate& b) {
  return a.logit > b.logit || (a.logit == b.logit && a.token < b.token);
}

// The k most likely tokens with a scaled logit of at least cutoff, most likely first. One pass:
// a buffer of 2k is cut back to k whenever it fills, which raises the bar for the rest.
void select_top_k(std::span<const float> logits, std::size_t k, Softmax softmax, float cutoff,
                  std::vector<Candidate>& out);

// All tokens with a scaled logit of at least cutoff, in order of token id.
void select_above(std::span<const float> logits, Softmax softmax, float cutoff,
                  std::vector<Candidate>& out);

// Shrink to the smallest set of most likely tokens that holds at least top_p of total, sorted by
// likelihood. Only as many candidates as needed are sorted.
void keep_nucleus(std::vector<Candidate>& candidates, Softmax softmax, double total, double top_p);

// The candidate at which the running sum of weights passes u times their sum.
std::int32_t draw_from(std::span<const Candidate> candidates, Softmax softmax, double u);

}  // namespace fuserve::sampling
