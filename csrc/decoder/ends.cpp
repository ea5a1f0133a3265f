// Both ends of a step: from tokens, or another stage's hidden states, to the first layer, and from
// the last layer to logits or the next stage.
#include <algorithm>

#include "decoder/fused_decoder.h"
#include "decoder/meeting.h"
#include "decoder/rope.h"
#include "linear/linear.h"
#include "linear/units.h"
#include "norm/norm.h"

namespace fuserve::FUSERVE_ISA {

void FusedDecoder::rotation_angles(const Step& step, int token) {
  for (size_t r = 0; r < model_.ropes.size(); ++r) {
    const std::ptrdiff_t at = static_cast<std::ptrdiff_t>(token) * (model_.ropes[r].dim / 2);
    rope_angles(model_.ropes[r], step.positions[token], work_.cosines[r] + at, work_.sines[r] + at);
  }
}

void FusedDecoder::receive(Lane& lane) {
  const int width = model_.hidden_size;
  lane.team.for_each(lane.thread, lane.step.num_tokens, [&](int token) {
    std::copy_n(lane.step.received + static_cast<std::ptrdiff_t>(token) * width, width,
                hidden_row(token));
    rotation_angles(lane.step, token);
  });
  lane.team.sync(lane.thread);
}

void FusedDecoder::pass_on(Lane& lane) {
  const int width = model_.hidden_size;
  lane.team.for_each(lane.thread, lane.step.num_tokens, [&](int token) {
    std::copy_n(hidden_row(token), width,
                lane.step.passed + static_cast<std::ptrdiff_t>(token) * width);
  });
}

void FusedDecoder::embed(Lane& lane) {
  if (model_.exchange != nullptr) return embed_with_ranks(lane);
  lane.team.for_each(lane.thread, lane.step.num_tokens, [&](int token) {
    unpack_row(model_.embedding, lane.step.tokens[token], hidden_row(token));
    finish_embedding(lane.step, token);
  });
  lane.team.sync(lane.thread);
}

// The rank that has a token's row gives it, the others zeros.
void FusedDecoder::embed_with_ranks(Lane& lane) {
  const int tokens = lane.step.num_tokens, width = model_.hidden_size;
  const int chunk = rows_per_exchange(width);
  for (int first = 0; first < tokens; first += chunk) {
    const int rows = std::min(chunk, tokens - first);
    float* part = model_.exchange->part();
    lane.team.for_each(lane.thread, rows, [&](int row) {
      float* target = part + static_cast<std::ptrdiff_t>(row) * width;
      const int mine = lane.step.tokens[first + row] - model_.first_token;
      if (mine >= 0 && mine < model_.embedding.rows)
        unpack_row(model_.embedding, mine, target);
      else
        std::fill_n(target, width, 0.0F);
    });
    const auto count = static_cast<size_t>(rows) * static_cast<size_t>(width);
    if (!meet(lane, [&](Exchange& exchange) { exchange.sum(count); })) return;
    add_ranks(lane, rows, [&](int row, int col, int n, F32x16 sum) {
      store_n(hidden_row(first + row) + col, sum, n);
    });
    lane.team.sync(lane.thread);
  }
  lane.team.for_each(lane.thread, tokens, [&](int token) { finish_embedding(lane.step, token); });
  lane.team.sync(lane.thread);
}

// What is done to a token's row of the embedding, and the angles of its position.
void FusedDecoder::finish_embedding(const Step& step, int token) {
  float* row = hidden_row(token);
  for (int k = 0; k < model_.hidden_size; ++k) row[k] *= model_.embedding_scale;
  if (model_.position_embedding != nullptr) {
    const float* position = model_.position_embedding +
                            static_cast<std::ptrdiff_t>(step.positions[token]) * model_.hidden_size;
    for (int k = 0; k < model_.hidden_size; ++k) row[k] += position[k];
  }
  if (model_.embedding_norm) normalize(model_.embedding_norm, row, model_.hidden_size, row);
  rotation_angles(step, token);
}

void FusedDecoder::hidden_states(Lane& lane) {
  const Step& step = lane.step;
  if (step.num_hidden_rows == 0) return;
  const int size = model_.hidden_size;
  lane.team.for_each(lane.thread, step.num_hidden_rows, [&](int row) {
    const float* source = hidden_row(step.hidden_rows[row]);
    float* target = step.hidden + static_cast<std::ptrdiff_t>(row) * size;
    if (model_.final_norm)
      normalize(model_.final_norm, source, size, target);
    else
      std::copy_n(source, size, target);
  });
  lane.team.sync(lane.thread);
}

template <class F>
void FusedDecoder::logit_rows(Lane& lane, const Rows& input, int first, int last, F&& row_of) {
  const PackedLinear& head = model_.head;
  const int rows = last - first;
  const int per_unit = tiles_per_unit(head, lane.team.size());
  const int units = ceil_div(head.tiles(), per_unit), block = rows_per_unit(head, input, rows);
  lane.team.for_each(lane.thread, ceil_div(rows, block) * units, [&](int unit) {
    const int start = first + unit / units * block, stop = std::min(start + block, last);
    const int tile = unit % units * per_unit, end = std::min(tile + per_unit, head.tiles());
    const int cols = (end - tile) * kTileRows, begin = tile * kTileRows;
    auto* product = lane.memory.product.get<float>(static_cast<size_t>(block * cols));
    linear_tiles(head, input, start, stop, tile, end, product, cols, lane.memory.linear);
    for (int row = start; row < stop; ++row) {
      float* source = product + (row - start) * cols;
      if (model_.logit_softcap > 0.0F) {
        const F32x16 cap = set1(model_.logit_softcap);
        for (int k = 0; k < cols; k += 16)
          store16(source + k, mul(cap, tanh(div(load16(source + k), cap))));
      }
      std::copy_n(source, std::min(cols, head.rows - begin), row_of(row) + begin);
    }
  });
}

void FusedDecoder::logits(Lane& lane) {
  const Step& step = lane.step;
  const int rows = step.num_logit_rows;
  if (rows == 0) return;
  const Rows input =
      prepare(lane, model_.final_norm,
              {work_.hidden, model_.hidden_size, model_.hidden_size, rows, step.logit_rows},
              {&model_.head});
  const auto row_at = [](float* rows_from, std::ptrdiff_t row, int width) {
    return rows_from + row * width;
  };
  if (model_.exchange == nullptr)
    return logit_rows(lane, input, 0, rows,
                      [&](int row) { return row_at(step.logits, row, model_.vocab_size); });
  // Ranks have shares of different sizes, but must exchange as many rows at a time.
  const std::vector<int>& shares = model_.vocab_sizes;
  const int chunk = rows_per_exchange(*std::max_element(shares.begin(), shares.end()));
  for (int first = 0; first < rows; first += chunk) {
    const int last = std::min(first + chunk, rows);
    float* part = model_.exchange->part();
    logit_rows(lane, input, first, last,
               [&](int row) { return row_at(part, row - first, model_.head.rows); });
    std::vector<size_t> counts;
    for (const int share : shares)
      counts.push_back(static_cast<size_t>(last - first) * static_cast<size_t>(share));
    if (!meet(lane, [&](Exchange& exchange) { exchange.gather(counts.data()); })) return;
    if (model_.gets_logits())
      lane.team.for_each(lane.thread, last - first, [&](int row) {
        float* target = row_at(step.logits, first + row, model_.vocab_size);
        for (size_t rank = 0; rank < shares.size(); ++rank) {
          const float* source = model_.exchange->parts()[rank];
          target = std::copy_n(source + static_cast<std::ptrdiff_t>(row) * shares[rank],
                               shares[rank], target);
        }
      });
    lane.team.sync(lane.thread);
  }
}

}  // namespace fuserve::FUSERVE_ISA
