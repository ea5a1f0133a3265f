// Types of 16 bits as stored, those of floating point with plain conversions.
#pragma once

#include <bit>
#include <cstdint>

namespace fuserve {

enum class Half : std::uint16_t {};    // IEEE binary16
enum class BFloat : std::uint16_t {};  // the upper half of a binary32
struct ShortPair {                     // two neighbouring features
  std::int16_t first, second;
};

inline float to_float(BFloat b) {
  return std::bit_cast<float>(static_cast<std::uint32_t>(b) << 16);
}

inline float to_float(Half h) {
  const std::uint32_t bits = static_cast<std::uint16_t>(h);
  const std::uint32_t sign = (bits & 0x8000U) << 16;
  const std::uint32_t rest = bits & 0x7FFFU;
  if (rest >= 0x7C00U) return std::bit_cast<float>(sign | 0x7F800000U | (rest & 0x3FFU) << 13);
  // Shifting into place leaves an exponent biased by 15 instead of 127; the product with 2^112
  // corrects it, subnormal numbers included.
  const float magnitude = std::bit_cast<float>(rest << 13) * 0x1p112F;
  return std::bit_cast<float>(std::bit_cast<std::uint32_t>(magnitude) | sign);
}

// Rounds to nearest, ties to even.
inline Half to_half(float x) {
  const auto bits = std::bit_cast<std::uint32_t>(x);
  const auto sign = static_cast<std::uint16_t>((bits >> 16) & 0x8000U);
  const std::uint32_t rest = bits & 0x7FFFFFFFU;
  std::uint32_t half;
  if (rest > 0x7F800000U) {
    half = 0x7E00U;
  } else if (rest >= 0x477FF000U) {
    half = 0x7C00U;
  } else if (rest < 0x38800000U) {
    // Adding 0.5 puts the subnormal's last bit at the last bit of the sum, which rounds it.
    half = std::bit_cast<std::uint32_t>(std::bit_cast<float>(rest) + 0.5F) - 0x3F000000U;
  } else {
    half = (rest - 0x38000000U + 0xFFFU + ((rest >> 13) & 1U)) >> 13;
  }
  return static_cast<Half>(static_cast<std::uint16_t>(half | sign));
}

}  // namespace fuserve
