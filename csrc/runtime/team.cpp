#include "runtime/team.h"

#include "runtime/relax.h"

namespace fuserve {
namespace {

// First as fast as possible: a pause takes about 40 cycles on the x86 cores of the last years, so
// this is 10 to 25 microseconds, longer than teammates that all run let one another wait.
constexpr int kSpins = 1000;
// Then giving the core away, which costs a fraction of a microsecond where nobody wants it and lets
// the teammate come who was waiting for it where somebody does.
constexpr int kYields = 50;

// Returns once `value` is no longer `old`: spins, yields, and then sleeps.
void wait_for_change(const std::atomic<std::uint32_t>& value, std::uint32_t old) {
  for (int spin = 0; spin < kSpins; ++spin) {
    if (value.load(std::memory_order_acquire) != old) return;
    relax();
  }
  for (int yield = 0; yield < kYields; ++yield) {
    if (value.load(std::memory_order_acquire) != old) return;
    std::this_thread::yield();
  }
  while (value.load(std::memory_order_acquire) == old) value.wait(old, std::memory_order_acquire);
}

}  // namespace

Team::Team(int num_threads)
    : num_threads_(num_threads),
      shares_(static_cast<size_t>(3 * num_threads)),
      phases_(static_cast<size_t>(num_threads)) {}

void Team::sync(int thread) {
  if (num_threads_ == 1) return;
  int& phase = phases_[static_cast<size_t>(thread)].number;
  shares_[static_cast<size_t>((phase + 1) % 3 * num_threads_ + thread)].taken.store(
      0, std::memory_order_relaxed);
  phase = (phase + 1) % 3;
  const std::uint32_t generation = generation_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) == num_threads_ - 1) {
    arrived_.store(0, std::memory_order_relaxed);
    generation_.fetch_add(1, std::memory_order_release);
    generation_.notify_all();
  } else {
    wait_for_change(generation_, generation);
  }
}

ThreadPool::ThreadPool(int num_threads) : team_(num_threads) {
  for (int thread = 1; thread < num_threads; ++thread)
    workers_.emplace_back([this, thread] { work(thread); });
}

ThreadPool::~ThreadPool() {
  stopping_.store(true);
  ticket_.fetch_add(1);
  ticket_.notify_all();
  for (std::thread& worker : workers_) worker.join();
}

void ThreadPool::run(const std::function<void(Team&, int)>& job) {
  job_ = &job;
  ticket_.fetch_add(1, std::memory_order_release);
  ticket_.notify_all();
  job(team_, 0);
  team_.sync(0);
}

void ThreadPool::work(int thread) {
  std::uint32_t seen = 0;
  while (true) {
    wait_for_change(ticket_, seen);
    // Tickets come one at a time: `run` ends with a barrier that this thread passes below.
    ++seen;
    if (stopping_.load()) return;
    (*job_)(team_, thread);
    team_.sync(thread);
  }
}

}  // namespace fuserve
