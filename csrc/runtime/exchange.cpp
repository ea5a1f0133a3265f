#include "runtime/exchange.h"

#include <chrono>
#include <string>
#include <thread>

#include "runtime/relax.h"

namespace fuserve {
namespace {

// Two cache lines, as processors fetch neighbours together.
constexpr size_t kLine = 128;

// As a team's threads do: first at once, then giving the core away to a rank that may want it.
constexpr int kSpins = 2000;
// When a rank is late by more than this, it is not on its way to this exchange: wait without load.
constexpr auto kPatience = std::chrono::milliseconds(20);
constexpr auto kNap = std::chrono::microseconds(100);

size_t padded(size_t floats) { return (floats * sizeof(float) + kLine - 1) / kLine * kLine; }

size_t header_bytes(int size) { return (static_cast<size_t>(size) + 1) * kLine; }

}  // namespace

size_t SharedExchange::segment_bytes(int size, size_t floats) {
  return header_bytes(size) + 2 * static_cast<size_t>(size) * padded(floats);
}

SharedExchange::SharedExchange(std::uint8_t* memory, int rank, int size, size_t floats,
                               double timeout_s)
    : Exchange(rank, size), memory_(memory), floats_(floats), timeout_s_(timeout_s) {
  parts_.resize(static_cast<size_t>(size));
}

SharedExchange::Word& SharedExchange::word(int line) const {
  return *reinterpret_cast<Word*>(memory_ + static_cast<size_t>(line) * kLine);
}

float* SharedExchange::part_of(int rank, std::uint64_t number) const {
  const size_t index = number % 2 * static_cast<size_t>(size()) + static_cast<size_t>(rank);
  return reinterpret_cast<float*>(memory_ + header_bytes(size()) + index * padded(floats_));
}

void SharedExchange::meet() {
  ++number_;
  word(1 + rank()).store(number_, std::memory_order_release);
  for (int other = 0; other < size(); ++other) {
    wait_for(other);
    parts_[static_cast<size_t>(other)] = part_of(other, number_);
  }
}

void SharedExchange::wait_for(int rank) const {
  using Clock = std::chrono::steady_clock;
  const Word& theirs = word(1 + rank);
  const auto is_there = [&] { return theirs.load(std::memory_order_acquire) >= number_; };
  for (int spin = 0; spin < kSpins; ++spin) {
    if (is_there()) return;
    relax();
  }
  const auto start = Clock::now();
  while (!is_there()) {
    if (word(0).load(std::memory_order_relaxed) != 0)
      throw ExchangeError("the group of ranks is being ended");
    const auto waited = Clock::now() - start;
    if (std::chrono::duration<double>(waited).count() > timeout_s_)
      throw ExchangeError("rank " + std::to_string(rank) + " did not come to exchange " +
                          std::to_string(number_) + " within " + std::to_string(timeout_s_) + " s");
    if (waited < kPatience)
      std::this_thread::yield();
    else
      std::this_thread::sleep_for(kNap);
  }
}

void SharedExchange::abort() { word(0).store(1, std::memory_order_relaxed); }

}  // namespace fuserve
