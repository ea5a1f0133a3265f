// Picks the next token of one sequence from its row of logits.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace fuserve::sampling {

enum class Status : std::int32_t {
  ok = 0,
  nan = 1,       // a logit is NaN
  infinite = 2,  // a logit is +inf
  empty = 3,     // every logit is -inf, or no token is allowed
};

struct Penalties {
  float repetition = 1.0F;
  float presence = 0.0F;
  float frequency = 0.0F;
  std::span<const std::int32_t> ids;     // the distinct tokens of prompt and output
  std::span<const std::int32_t> counts;  // how often each was put out; 0 if only in the prompt
};

struct LogitBias {
  std::span<const std::int32_t> ids;
  std::span<const float> values;
};

struct Options {
  float temperature = 1.0F;  // 0 is greedy
  std::int32_t top_k = 0;    // 0 is off
  double top_p = 1.0;
  float min_p = 0.0F;
  Penalties penalties;
  LogitBias bias;
  std::span<const std::int32_t> allowed;  // a bit a token, the lowest first; empty allows all
  std::int32_t num_logprobs = -1;         // alternatives to report; -1 reports no logprob at all
};

struct Choice {
  Status status = Status::ok;
  std::int32_t token = -1;
  float logprob = 0.0F;   // of the raw distribution, before bias, penalties and temperature
  std::int32_t rank = 0;  // 1 is the most likely token of the raw distribution
  std::vector<std::int32_t> top_ids;
  std::vector<float> top_logprobs;
};

// Logit bias, penalties, the tokens not allowed excluded, temperature, min-p, top-k, top-p, in this
// order (vLLM's), then the token where the cumulative distribution passes u, 0 <= u < 1. Of equal
// logits the lower id is ranked first. All ids must be inside the row, and `allowed` must have
// ceil(vocabulary / 32) words or none.
Choice sample(std::span<const float> logits, const Options& options, double u);

// Log probability and rank of a given token, and the num_logprobs most likely ones; what `sample`
// reports of a token it chose.
Choice score(std::span<const float> logits, std::int32_t token, std::int32_t num_logprobs);

// The most likely token, the lowest id of equals.
Choice greedy(std::span<const float> logits);

}  // namespace fuserve::sampling
