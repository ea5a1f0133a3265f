// Where the ranks that share layers meet within a step.
#pragma once

#include <algorithm>

#include "decoder/fused_decoder.h"
#include "decoder/tree_sum.h"

namespace fuserve::FUSERVE_ISA {

template <class F>
bool FusedDecoder::meet(Lane& lane, F&& exchange) {
  lane.team.sync(lane.thread);
  if (lane.thread == 0) {
    try {
      exchange(*model_.exchange);
    } catch (...) {
      failure_ = std::current_exception();
      failed_ = true;
    }
  }
  lane.team.sync(lane.thread);
  return !failed_;
}

template <class F>
void FusedDecoder::add_ranks(Lane& lane, int rows, F&& f) {
  constexpr int kCols = 512;
  const std::vector<const float*>& parts = model_.exchange->parts();
  const int width = model_.hidden_size, units = ceil_div(width, kCols);
  lane.team.for_each(lane.thread, rows * units, [&](int unit) {
    const int row = unit / units, begin = unit % units * kCols;
    tree_sum(parts.data(), static_cast<int>(parts.size()),
             static_cast<std::ptrdiff_t>(row) * width + begin, std::min(kCols, width - begin),
             [&](int k, int n, F32x16 sum) { f(row, begin + k, n, sum); });
  });
}

}  // namespace fuserve::FUSERVE_ISA
