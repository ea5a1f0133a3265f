// A pool of threads that run one function together, with barriers and shared loops.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

namespace fuserve {

// What a thread of the running team sees. All threads call the same sequence of `sync`; between two
// of them they may share at most one loop.
class Team {
 public:
  explicit Team(int num_threads);

  int size() const { return num_threads_; }

  // Waits for all threads. Spins for some tens of microseconds, yields to others, then sleeps.
  void sync(int thread);

  // Calls fn(i) once for each i in [0, n), each on some thread. A thread takes from its own share
  // of consecutive indices first, so that its reads stay sequential, then helps the others.
  template <class F>
  void for_each(int thread, int n, F&& fn) {
    if (num_threads_ == 1) {
      for (int i = 0; i < n; ++i) fn(i);
      return;
    }
    Share* shares = loop(thread);
    for (int offset = 0; offset < num_threads_; ++offset) {
      const int owner = (thread + offset) % num_threads_;
      const int begin = static_cast<int>(static_cast<int64_t>(n) * owner / num_threads_);
      const int end = static_cast<int>(static_cast<int64_t>(n) * (owner + 1) / num_threads_);
      std::atomic<int>& taken = shares[owner].taken;
      while (taken.load(std::memory_order_relaxed) < end - begin) {
        const int i = begin + taken.fetch_add(1, std::memory_order_relaxed);
        if (i >= end) break;
        fn(i);
      }
    }
  }

 private:
  struct alignas(64) Share {
    std::atomic<int> taken{0};
  };
  struct alignas(64) Phase {
    int number = 0;
  };

  Share* loop(int thread) {
    return &shares_[static_cast<size_t>(phases_[static_cast<size_t>(thread)].number % 3 *
                                        num_threads_)];
  }

  const int num_threads_;
  // Three sets of loop counters: while one is in use, each thread clears its own in the next,
  // which no thread has touched since the barrier before last.
  std::vector<Share> shares_;
  std::vector<Phase> phases_;
  alignas(64) std::atomic<int> arrived_{0};
  alignas(64) std::atomic<std::uint32_t> generation_{0};
};

// Owns num_threads - 1 workers; the calling thread is the team's first. Idle workers spin briefly
// and then sleep, so that an idle pool uses no CPU.
class ThreadPool {
 public:
  explicit ThreadPool(int num_threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int size() const { return team_.size(); }

  // Runs job(team, thread) on every thread and returns when all are done. One caller at a time.
  void run(const std::function<void(Team&, int)>& job);

 private:
  void work(int thread);

  Team team_;
  const std::function<void(Team&, int)>* job_ = nullptr;
  alignas(64) std::atomic<std::uint32_t> ticket_{0};
  std::atomic<bool> stopping_{false};
  std::vector<std::thread> workers_;
};

}  // namespace fuserve
