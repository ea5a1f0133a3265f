#include "sampling/sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "sampling/candidates.h"
#include "sampling/row.h"

namespace fuserve::sampling {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Buffers kept between calls, so that sampling allocates nothing in steady state.
struct Scratch {
  std::vector<float> adjusted;
  std::vector<Candidate> candidates;
  std::vector<double> block_totals;
};

Scratch& scratch() {
  thread_local Scratch instance;
  return instance;
}

Status status_of(RowScan row) {
  if (row.has_nan) {
    return Status::nan;
  }
  if (row.max == kInfinity) {
    return Status::infinite;
  }
  return row.max == -kInfinity ? Status::empty : Status::ok;
}

bool adjusts(const Options& options) {
  const Penalties& p = options.penalties;
  return !options.bias.ids.empty() || !options.allowed.empty() || p.repetition != 1.0F ||
         p.presence != 0.0F || p.frequency != 0.0F;
}

void penalize(std::vector<float>& logits, const Penalties& penalties) {
  for (std::size_t i = 0; i < penalties.ids.size(); ++i) {
    float& logit = logits[static_cast<std::size_t>(penalties.ids[i])];
    logit = logit > 0.0F ? logit / penalties.repetition : logit * penalties.repetition;
    if (penalties.counts[i] > 0) {
      const auto count = static_cast<float>(penalties.counts[i]);
      logit -= penalties.frequency * count + penalties.presence;
    }
  }
}

// Sets the logits of tokens whose bit is not set to -inf.
void exclude(std::vector<float>& logits, std::span<const std::int32_t> allowed) {
  constexpr std::size_t kBits = 32;
  for (std::size_t word = 0; word < allowed.size(); ++word) {
    const auto bits = static_cast<std::uint32_t>(allowed[word]);
    if (bits == ~std::uint32_t{0}) {
      continue;
    }
    const std::size_t end = std::min((word + 1) * kBits, logits.size());
    for (std::size_t i = word * kBits; i < end; ++i) {
      if ((bits >> (i % kBits) & 1U) == 0) {
        logits[i] = -kInfinity;
      }
    }
  }
}

std::span<const float> adjust(std::span<const float> logits, const Options& options) {
  std::vector<float>& adjusted = scratch().adjusted;
  adjusted.assign(logits.begin(), logits.end());
  for (std::size_t i = 0; i < options.bias.ids.size(); ++i) {
    adjusted[static_cast<std::size_t>(options.bias.ids[i])] += options.bias.values[i];
  }
  penalize(adjusted, options.penalties);
  exclude(adjusted, options.allowed);
  return adjusted;
}

std::int32_t draw(std::span<const float> logits, float max, const Options& options, double u) {
  std::vector<Candidate>& candidates = scratch().candidates;
  const Softmax softmax{max, 1.0F / options.temperature};
  const bool cuts_k = options.top_k > 0 && static_cast<std::size_t>(options.top_k) < logits.size();
  const bool cuts_p = options.top_p < 1.0;
  float cutoff = options.min_p > 0.0F ? std::log(options.min_p) : -kInfinity;
  if (!cuts_k && !cuts_p && cutoff == -kInfinity) {
    return draw_from_row(logits, softmax, u, scratch().block_totals);
  }
  double total = 0.0;
  if (cuts_k) {
    select_top_k(logits, static_cast<std::size_t>(options.top_k), softmax, cutoff, candidates);
    for (const Candidate& candidate : candidates) {
      total += static_cast<double>(softmax.weight(candidate.logit));
    }
  } else {
    if (cuts_p) {
      // Tokens below (1 - top_p) / vocabulary of the mass hold at most 1 - top_p together,
      // so the nucleus lies above; half of that leaves room for rounding.
      total = total_weight(logits, softmax, cutoff);
      const double size = static_cast<double>(logits.size());
      const double least = 0.5 * (1.0 - options.top_p) * total / size;
      cutoff = std::max(cutoff, static_cast<float>(std::log(least)));
    }
    select_above(logits, softmax, cutoff, candidates);
  }
  if (cuts_p) {
    keep_nucleus(candidates, softmax, total, options.top_p);
  }
  return draw_from(candidates, softmax, u);
}

void report_logprobs(std::span<const float> logits, float max, std::int32_t num_logprobs,
                     Choice& choice) {
  const Softmax softmax{max, 1.0F};
  const double log_total = std::log(total_weight(logits, softmax, -kInfinity));
  const auto logprob = [&](float logit) {
    return static_cast<float>(static_cast<double>(logit) - static_cast<double>(max) - log_total);
  };
  const float chosen = logits[static_cast<std::size_t>(choice.token)];
  choice.logprob = logprob(chosen);
  choice.rank = 1 + count_greater(logits, chosen);
  if (num_logprobs > 0) {
    std::vector<Candidate>& top = scratch().candidates;
    select_top_k(logits, static_cast<std::size_t>(num_logprobs), softmax, -kInfinity, top);
    for (const Candidate& candidate : top) {
      choice.top_ids.push_back(candidate.token);
      choice.top_logprobs.push_back(logprob(candidate.logit));
    }
  }
}

}  // namespace

Choice greedy(std::span<const float> logits) {
  const RowScan row = scan(logits);
  Choice choice;
  choice.status = status_of(row);
  if (choice.status == Status::ok) {
    choice.token = first_equal(logits, row.max);
  }
  return choice;
}

Choice sample(std::span<const float> logits, const Options& options, double u) {
  const RowScan raw = scan(logits);
  Choice choice;
  choice.status = status_of(raw);
  if (choice.status != Status::ok) {
    return choice;
  }
  std::span<const float> adjusted = logits;
  float max = raw.max;
  if (adjusts(options)) {
    adjusted = adjust(logits, options);
    const RowScan row = scan(adjusted);
    choice.status = status_of(row);
    if (choice.status != Status::ok) {
      return choice;
    }
    max = row.max;
  }
  choice.token =
      options.temperature == 0.0F ? first_equal(adjusted, max) : draw(adjusted, max, options, u);
  if (options.num_logprobs >= 0) {
    report_logprobs(logits, raw.max, options.num_logprobs, choice);
  }
  return choice;
}

Choice score(std::span<const float> logits, std::int32_t token, std::int32_t num_logprobs) {
  const RowScan row = scan(logits);
  Choice choice;
  choice.status = status_of(row);
  if (choice.status == Status::ok) {
    choice.token = token;
    report_logprobs(logits, row.max, num_logprobs, choice);
  }
  return choice;
}

}  // namespace fuserve::sampling
