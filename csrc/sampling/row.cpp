#include "sampling/row.h"

#include <algorithm>
#include <array>
#include <cstring>
#include <limits>

// Compiled for several instruction sets, of which the machine's best is taken when the module is
// loaded. Their results are equal to the bit: nothing is contracted, and sums have fixed lanes.
#if defined(__x86_64__) && !defined(__SANITIZE_ADDRESS__)
#define FUSERVE_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define FUSERVE_CLONES
#endif

namespace fuserve::sampling {
namespace {

// Independent accumulators: wide enough for any vector unit, and the same sums on all of them.
constexpr std::size_t kLanes = 16;
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

using Lanes = float __attribute__((vector_size(kLanes * sizeof(float))));
using LaneMask = std::int32_t __attribute__((vector_size(kLanes * sizeof(std::int32_t))));

FUSERVE_CLONES double block_total(std::span<const float> logits, Softmax softmax, float cutoff) {
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

FUSERVE_CLONES RowScan scan(std::span<const float> logits) {
  Lanes highest = Lanes{} + kMinusInfinity;
  LaneMask nan{};
  std::size_t i = 0;
  for (; i + kLanes <= logits.size(); i += kLanes) {
    Lanes x;
    std::memcpy(&x, logits.data() + i, sizeof(x));
    highest = highest < x ? x : highest;
    nan |= x != x;
  }
  RowScan result{kMinusInfinity, false};
  for (std::size_t lane = 0; lane < kLanes; ++lane) {
    result.max = std::max(result.max, highest[lane]);
    result.has_nan = result.has_nan || nan[lane] != 0;
  }
  for (; i < logits.size(); ++i) {
    result.max = std::max(result.max, logits[i]);
    result.has_nan = result.has_nan || logits[i] != logits[i];
  }
  return result;
}

FUSERVE_CLONES std::int32_t first_equal(std::span<const float> logits, float value) {
  // Whole blocks without a branch for each element, which vectorize, then the one that has it.
  std::size_t start = 0;
  for (; start + kBlock <= logits.size(); start += kBlock) {
    std::int32_t found = 0;
    for (std::size_t i = start; i < start + kBlock; ++i) {
      found |= static_cast<std::int32_t>(logits[i] == value);
    }
    if (found != 0) {
      break;
    }
  }
  const auto from = logits.begin() + static_cast<std::ptrdiff_t>(start);
  return static_cast<std::int32_t>(std::find(from, logits.end(), value) - logits.begin());
}

FUSERVE_CLONES std::int32_t count_greater(std::span<const float> logits, float value) {
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
