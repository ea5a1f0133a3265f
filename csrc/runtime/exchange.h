// Sums and gathers among the ranks that share a model's layers.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <vector>

namespace fuserve {

// A rank does not answer, or the group is being ended.
struct ExchangeError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// One exchange at a time, the same ones in the same order in all ranks. A rank writes its part
// where `part` says; then one thread calls `sum` or `gather`, which return when all parts are
// there.
class Exchange {
 public:
  Exchange(int rank, int size) : rank_(rank), size_(size) {}
  virtual ~Exchange() = default;

  int rank() const { return rank_; }
  int size() const { return size_; }
  // Floats that a part can have.
  virtual size_t capacity() const = 0;

  // Makes room for parts of up to `count` floats, at most `capacity`, while nobody exchanges.
  virtual void reserve(size_t count) = 0;
  // This rank's next part.
  virtual float* part() = 0;
  // Afterwards parts() holds what is to be added as a tree: all ranks' parts, or their sum alone.
  // Throws ExchangeError.
  virtual void sum(size_t count) = 0;
  // Afterwards parts() of rank 0 holds all ranks' parts, of counts[rank] floats. Throws
  // ExchangeError.
  virtual void gather(const size_t* counts) = 0;
  // Valid until the next exchange; in this rank until it writes its part of it.
  const std::vector<const float*>& parts() const { return parts_; }

 protected:
  std::vector<const float*> parts_;

 private:
  const int rank_;
  const int size_;
};

// Through memory that the ranks of one host share. The memory is zeros when the first rank joins:
//   a line with a word that is set to end the group
//   for each rank a line with the number of the last exchange that its part is complete of
//   twice, for exchanges of even and odd numbers: for each rank `capacity` floats
// A rank that goes on to exchange n + 1 has read all parts of n, so its part of n + 2 may take
// their place once all have come to n + 1.
class SharedExchange final : public Exchange {
 public:
  static size_t segment_bytes(int size, size_t floats);

  // `memory` is aligned to 64 bytes and has segment_bytes(size, floats).
  SharedExchange(std::uint8_t* memory, int rank, int size, size_t floats, double timeout_s);

  size_t capacity() const override { return floats_; }
  void reserve(size_t) override {}
  float* part() override { return part_of(rank(), number_ + 1); }
  void sum(size_t) override { meet(); }
  void gather(const size_t*) override { meet(); }

  // Lets every rank's present and later exchanges fail at once.
  void abort();

 private:
  using Word = std::atomic<std::uint64_t>;
  static_assert(Word::is_always_lock_free && sizeof(Word) == 8);

  Word& word(int line) const;
  float* part_of(int rank, std::uint64_t number) const;
  void meet();
  void wait_for(int rank) const;

  std::uint8_t* const memory_;
  const size_t floats_;
  const double timeout_s_;
  std::uint64_t number_ = 0;  // of the last exchange
};

}  // namespace fuserve
