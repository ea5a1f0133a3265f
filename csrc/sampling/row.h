// One row of logits: scans, exponentials and sums that every sampling mode needs.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

namespace fuserve::sampling {

// Elements summed in one float accumulation before it joins a double.
inline constexpr std::size_t kBlock = 512;

struct RowScan {
  float max;
  bool has_nan;
};

// The largest logit, and whether any is NaN (max is then meaningless).
RowScan scan(std::span<const float> logits);

// Index of the first element equal to value; the row must contain it.
std::int32_t first_equal(std::span<const float> logits, float value);

// Number of elements greater than value.
std::int32_t count_greater(std::span<const float> logits, float value);

// exp(x) for x <= 0, relative error below 2e-7, exactly 0 below -87. Written without branches or
// table so that compilers vectorize loops over it for any instruction set.
inline float exp_nonpositive(float x) {
  constexpr float kLowest = -87.0F;
  constexpr float kLog2E = 1.44269504F;
  constexpr float kLn2High = 0.693359375F;
  constexpr float kLn2Low = -2.12194440e-4F;
  constexpr float kRound = 12582912.0F;  // 1.5 * 2^23: adding it rounds to an integer
  const float clamped = x < kLowest ? kLowest : x;
  const float exponent = (clamped * kLog2E + kRound) - kRound;
  const float r = (clamped - exponent * kLn2High) - exponent * kLn2Low;
  float p = 1.9875691500e-4F;
  p = p * r + 1.3981999507e-3F;
  p = p * r + 8.3334519073e-3F;
  p = p * r + 4.1665795894e-2F;
  p = p * r + 1.6666665459e-1F;
  p = p * r + 5.0000001201e-1F;
  p = p * r * r + r + 1.0F;
  const auto bits = (static_cast<std::int32_t>(exponent) + 127) << 23;
  const float value = p * std::bit_cast<float>(bits);
  return x < kLowest ? 0.0F : value;
}

// Softmax weights exp((x - max) / temperature) of a row, unnormalized.
struct Softmax {
  float max;
  float inverse_temperature;

  float scaled(float logit) const { return (logit - max) * inverse_temperature; }
  float weight(float logit) const { return exp_nonpositive(scaled(logit)); }
};

// Sum of the weights of the logits whose scaled value is at least cutoff.
double total_weight(std::span<const float> logits, Softmax softmax, float cutoff);

// The token at which the running sum of weights, in order of token id, passes u * total.
std::int32_t draw_from_row(std::span<const float> logits, Softmax softmax, double u,
                           std::vector<double>& block_totals);

}  // namespace fuserve::sampling
