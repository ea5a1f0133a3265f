#include "sampling/row.h"

#include <algorithm>
#include <array>
#include <limits>

namespace fuserve::sampling {
namespace {

// Independent accumulators: wide enough for any vector unit, and the same sums on all of them.
constexpr std::size_t kLanes = 16;
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

double block_total(std::span<const float> logits, Softmax softmax, float cutoff) {
  std::array<float, kLanes> lanes{};
  std::size_t i = 0;
  for (; i + kLanes <= logits.size(); i += kLanes) {
    for (std::size_t lane = 0; lane < kLanes; ++lane) {
      const float scaled = softmax.scaled(logits[i + lane]);
      const float weight = exp_nonpositive(scaled);
      lanes[lane] += scaled >= cutoff ? weight : 0.0F;
    }
  }
  double total = 0.0;
  for (const float lane : lanes) {
    total += static_cast<double>(lane);
  }
  for (; i < logits.size(); ++i) {
    const float scaled = softmax.scaled(logits[i]);
    total += scaled >= cutoff ? static_cast<double>(exp_nonpositive(scaled)) : 0.0;
  }
  return total;
}

// The element at which the running sum passes target, else the last one with any weight.
std::int32_t draw_in_block(std::span<const float> logits, Softmax softmax, double target) {
  double passed = 0.0;
  std::int32_t last = -1;
  for (std::size_t i = 0; i < logits.size(); ++i) {
    const float weight = softmax.weight(logits[i]);
    if (weight > 0.0F) {
      passed += static_cast<double>(weight);
      last = static_cast<std::int32_t>(i);
      if (passed > target) {
        break;
      }
    }
  }
  return last;
}

}  // namespace

RowScan scan(std::span<const float> logits) {
  std::array<float, kLanes> highest;
  highest.fill(kMinusInfinity);
  std::array<std::uint32_t, kLanes> nan{};
  std::size_t i = 0;
  for (; i + kLanes <= logits.size(); i += kLanes) {
    for (std::size_t lane = 0; lane < kLanes; ++lane) {
      const float x = logits[i + lane];
      highest[lane] = highest[lane] < x ? x : highest[lane];
      nan[lane] |= static_cast<std::uint32_t>(x != x);
    }
  }
  RowScan result{*std::max_element(highest.begin(), highest.end()), false};
  result.has_nan = std::any_of(nan.begin(), nan.end(), [](std::uint32_t bit) { return bit != 0; });
  for (; i < logits.size(); ++i) {
    result.max = std::max(result.max, logits[i]);
    result.has_nan = result.has_nan || logits[i] != logits[i];
  }
  return result;
}

std::int32_t first_equal(std::span<const float> logits, float value) {
  return static_cast<std::int32_t>(std::find(logits.begin(), logits.end(), value) - logits.begin());
}

std::int32_t count_greater(std::span<const float> logits, float value) {
  std::int32_t count = 0;
  for (const float x : logits) {
    count += static_cast<std::int32_t>(x > value);
  }
  return count;
}

double total_weight(std::span<const float> logits, Softmax softmax, float cutoff) {
  double total = 0.0;
  for (std::size_t start = 0; start < logits.size(); start += kBlock) {
    const std::size_t size = std::min(kBlock, logits.size() - start);
    total += block_total(logits.subspan(start, size), softmax, cutoff);
  }
  return total;
}

std::int32_t draw_from_row(std::span<const float> logits, Softmax softmax, double u,
                           std::vector<double>& block_totals) {
  block_totals.clear();
  double total = 0.0;
  for (std::size_t start = 0; start < logits.size(); start += kBlock) {
    const std::size_t size = std::min(kBlock, logits.size() - start);
    block_totals.push_back(block_total(logits.subspan(start, size), softmax, kMinusInfinity));
    total += block_totals.back();
  }
  const double target = u * total;
  double passed = 0.0;
  std::size_t chosen = 0;
  double before_chosen = 0.0;
  for (std::size_t block = 0; block < block_totals.size(); ++block) {
    if (block_totals[block] <= 0.0) {
      continue;
    }
    chosen = block;
    before_chosen = passed;
    passed += block_totals[block];
    if (passed > target) {
      break;
    }
  }
  const std::size_t start = chosen * kBlock;
  const std::size_t size = std::min(kBlock, logits.size() - start);
  return static_cast<std::int32_t>(start) +
         draw_in_block(logits.subspan(start, size), softmax, target - before_chosen);
}

}  // namespace fuserve::sampling
