#include "machine/ceilings.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstring>
#include <vector>

#include "runtime/buffer.h"
#include "simd/simd.h"

namespace fuserve::FUSERVE_ISA {
namespace {

// Keeps the optimizer from removing a measured loop.
std::atomic<float> sink;

double seconds_of(ThreadPool& pool, const std::function<void(Team&, int)>& job) {
  const auto start = std::chrono::steady_clock::now();
  pool.run(job);
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

double best_rate(ThreadPool& pool, double work_per_thread,
                 const std::function<void(Team&, int)>& job) {
  double best = 0.0;
  for (int run = 0; run < 5; ++run)
    best = std::max(best, work_per_thread * pool.size() / seconds_of(pool, job));
  return best;
}

}  // namespace

double read_bandwidth(ThreadPool& pool, size_t bytes, int passes) {
  const Buffer buffer(bytes);
  std::memset(buffer.as<char>(), 1, bytes);
  const size_t share = bytes / sizeof(float) / static_cast<size_t>(pool.size()) / 64 * 64;
  double best = 0.0;
  // How far ahead memory is fetched fastest differs between processors.
  for (const size_t ahead : {size_t{0}, size_t{512}, size_t{2048}})
    for (int pass = 0; pass < passes; ++pass) {
      const double seconds = seconds_of(pool, [&](Team&, int thread) {
        const float* data = buffer.as<float>() + share * static_cast<size_t>(thread);
        F32x16 a = zero(), b = zero(), c = zero(), d = zero();
        for (size_t i = 0; i < share; i += 64) {
          if (ahead > 0)
            for (size_t line = 0; line < 64; line += 16) prefetch(data + i + ahead + line);
          a = add(a, load16(data + i));
          b = add(b, load16(data + i + 16));
          c = add(c, load16(data + i + 32));
          d = add(d, load16(data + i + 48));
        }
        sink = reduce_add(add(add(a, b), add(c, d)));
      });
      const double read = static_cast<double>(share) * sizeof(float) * pool.size();
      best = std::max(best, read / seconds);
    }
  return best;
}

double fp32_rate(ThreadPool& pool) {
  constexpr int kLoops = 2'000'000, kChains = 6;
  return best_rate(pool, 2.0 * 16 * kChains * kLoops, [](Team&, int thread) {
    F32x16 acc[kChains];
    for (int i = 0; i < kChains; ++i) acc[i] = set1(static_cast<float>(thread + i));
    const F32x16 x = set1(0.999F), y = set1(0.001F);
    for (int loop = 0; loop < kLoops; ++loop)
#pragma GCC unroll 8
      for (int i = 0; i < kChains; ++i) acc[i] = fma(acc[i], x, y);
    F32x16 total = acc[0];
    for (int i = 1; i < kChains; ++i) total = add(total, acc[i]);
    sink = reduce_add(total);
  });
}

double byte_dot_rate(ThreadPool& pool, bool q4) {
  constexpr int kLoops = 20'000, kBlocks = 8, T = kIntegerTokens, R = kTilesAtOnce;
  constexpr std::ptrdiff_t kStride = 320, kTile = 512 * kBlocks;
  return best_rate(pool, 2.0 * 16 * 32 * T * R * kBlocks * kLoops, [q4](Team&, int thread) {
    std::vector<std::uint8_t> weights(R * kTile, static_cast<std::uint8_t>(37 + thread));
    std::vector<std::int8_t> rows(T * kStride, std::int8_t{5});
    F32x16 total = zero();
    for (int loop = 0; loop < kLoops; ++loop)
      for (int block = 0; block < kBlocks; ++block) {
        I32x16 out[R][T];
        const std::int8_t* x = rows.data() + 32 * block;
        if (q4)
          dot_q4<T, R>(weights.data() + 256 * block, kTile, x, kStride, out);
        else
          dot_q8<T, R>(reinterpret_cast<const std::int8_t*>(weights.data()) + 512 * block, kTile, x,
                       kStride, out);
        for (const auto& tile : out)
#pragma GCC unroll 16
          for (int t = 0; t < T; ++t) total = add(total, to_float(tile[t]));
      }
    sink = reduce_add(total);
  });
}

double row_dot_rate(ThreadPool& pool) {
  constexpr int kLoops = 20'000, kBlocks = 8, T = kByteDotTokens, R = kTilesAtOnce;
  constexpr std::ptrdiff_t kStride = 320, kTile = 512 * kBlocks;
  return best_rate(pool, 2.0 * 16 * 32 * T * R * kBlocks * kLoops, [](Team&, int thread) {
    const std::vector<std::uint8_t> weights(R * kTile, static_cast<std::uint8_t>(137 + thread));
    const std::vector<std::int8_t> rows(T * kStride, std::int8_t{5});
    F32x16 total = zero();
    for (int loop = 0; loop < kLoops; ++loop) {
      I32x16 acc[R][T];
      for (auto& tile : acc)
#pragma GCC unroll 16
        for (int t = 0; t < T; ++t) tile[t] = set1_i32(0);
      for (int block = 0; block < kBlocks; ++block)
        add_byte_dot<kQuadsPerSum>(weights.data() + 512 * block, kTile, rows.data() + 32 * block,
                                   kStride, acc);
      for (const auto& tile : acc)
#pragma GCC unroll 16
        for (int t = 0; t < T; ++t) total = add(total, to_float(tile[t]));
    }
    sink = reduce_add(total);
  });
}

}  // namespace fuserve::FUSERVE_ISA
