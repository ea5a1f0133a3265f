#include "sampling/candidates.h"

#include <algorithm>
#include <limits>

namespace fuserve::sampling {
namespace {

using Offset = std::vector<Candidate>::difference_type;

// Candidates sorted at once while growing the nucleus; most nuclei are smaller.
constexpr std::size_t kFirstSorted = 128;

void cut_to(std::vector<Candidate>& candidates, std::size_t k) {
  if (candidates.size() > k) {
    const auto end = candidates.begin() + static_cast<Offset>(k);
    std::nth_element(candidates.begin(), end - 1, candidates.end(), more_likely);
    candidates.erase(end, candidates.end());
  }
}

}  // namespace

void select_top_k(std::span<const float> logits, std::size_t k, Softmax softmax, float cutoff,
                  std::vector<Candidate>& out) {
  out.clear();
  // Tokens come in ascending order, so a later one equal to the k-th best is less likely: `>`.
  float bar = -std::numeric_limits<float>::infinity();
  for (std::size_t i = 0; i < logits.size(); ++i) {
    const float logit = logits[i];
    if (!(logit > bar) || softmax.scaled(logit) < cutoff) {
      continue;
    }
    out.push_back({logit, static_cast<std::int32_t>(i)});
    if (out.size() == 2 * k) {
      cut_to(out, k);
      bar = out.back().logit;
    }
  }
  cut_to(out, k);
  std::sort(out.begin(), out.end(), more_likely);
}

void select_above(std::span<const float> logits, Softmax softmax, float cutoff,
                  std::vector<Candidate>& out) {
  out.clear();
  for (std::size_t i = 0; i < logits.size(); ++i) {
    if (softmax.scaled(logits[i]) >= cutoff) {
      out.push_back({logits[i], static_cast<std::int32_t>(i)});
    }
  }
}

void keep_nucleus(std::vector<Candidate>& candidates, Softmax softmax, double total, double top_p) {
  const double wanted = top_p * total;
  double held = 0.0;
  std::size_t sorted = 0;
  std::size_t next = kFirstSorted;
  while (sorted < candidates.size()) {
    const std::size_t end = std::min(sorted + next, candidates.size());
    const auto first = candidates.begin() + static_cast<Offset>(sorted);
    const auto last = candidates.begin() + static_cast<Offset>(end);
    if (last != candidates.end()) {
      std::nth_element(first, last - 1, candidates.end(), more_likely);
    }
    std::sort(first, last, more_likely);
    for (auto candidate = first; candidate != last; ++candidate) {
      held += static_cast<double>(softmax.weight(candidate->logit));
      if (held >= wanted) {
        candidates.erase(candidate + 1, candidates.end());
        return;
      }
    }
    sorted = end;
    next *= 4;
  }
}

std::int32_t draw_from(std::span<const Candidate> candidates, Softmax softmax, double u) {
  double total = 0.0;
  for (const Candidate& candidate : candidates) {
    total += static_cast<double>(softmax.weight(candidate.logit));
  }
  const double target = u * total;
  double passed = 0.0;
  std::int32_t last = candidates.front().token;
  for (const Candidate& candidate : candidates) {
    const float weight = softmax.weight(candidate.logit);
    if (weight > 0.0F) {
      passed += static_cast<double>(weight);
      last = candidate.token;
      if (passed > target) {
        break;
      }
    }
  }
  return last;
}

}  // namespace fuserve::sampling
