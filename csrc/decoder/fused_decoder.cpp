#include "decoder/fused_decoder.h"

#include <algorithm>

#include "attention/append.h"
#include "decoder/activation.h"
#include "decoder/rope.h"
#include "decoder/row_forms.h"
#include "linear/linear.h"
#include "norm/norm.h"

namespace fuserve::FUSERVE_ISA {
namespace {

// Rows of activations that one unit of work multiplies with its weights: few enough to stay in a
// core's second-level cache, whole (int8) or in the features of one panel (fp32).
int rows_per_unit(const PackedLinear& w, const Rows& x, int rows) {
  constexpr size_t kCacheBytes = 256 * 1024;
  constexpr int kStep = 24;  // whole passes in every instruction set
  const size_t row_bytes = w.wants_token_rows() ? x.tokens.layout.stride() : x.layout.stride();
  const bool is_int8 = w.wants_token_rows() || w.wants_quantized_input();
  const int most = is_int8 ? std::min(static_cast<int>(kCacheBytes / row_bytes), 120) : 240;
  const int units = ceil_div(rows, std::max(most / kStep * kStep, kStep));
  return round_up(ceil_div(rows, units), kStep);
}

// Tiles of one unit: enough work to be worth taking, few enough to divide well.
int tiles_per_unit(const PackedLinear& w, int num_threads) {
  return std::clamp(w.tiles() / (8 * num_threads), 1, 8);
}

constexpr int kFeedForwardCols = 128;  // the largest group that activation sums are kept for

}  // namespace

void FusedDecoder::step(const Step& step, ThreadPool& pool) {
  work_.reserve(model_, step.num_tokens, pool.size());
  plan_attention(step, pool.size());
  pool.run([&](Team& team, int thread) {
    Lane lane{team, thread, step, work_.threads[static_cast<size_t>(thread)]};
    run(lane);
  });
}

void FusedDecoder::run(Lane& lane) {
  embed(lane);
  for (int layer = 0; layer < static_cast<int>(model_.layers.size()); ++layer) {
    attention_half(lane, layer);
    feed_forward_half(lane, layer);
  }
  hidden_states(lane);
  logits(lane);
}

void FusedDecoder::embed(Lane& lane) {
  const Step& step = lane.step;
  lane.team.for_each(lane.thread, step.num_tokens, [&](int token) {
    float* row = hidden_row(token);
    unpack_row(model_.embedding, step.tokens[token], row);
    for (int k = 0; k < model_.hidden_size; ++k) row[k] *= model_.embedding_scale;
    if (model_.position_embedding != nullptr) {
      const float* position =
          model_.position_embedding +
          static_cast<std::ptrdiff_t>(step.positions[token]) * model_.hidden_size;
      for (int k = 0; k < model_.hidden_size; ++k) row[k] += position[k];
    }
    if (model_.embedding_norm) normalize(model_.embedding_norm, row, model_.hidden_size, row);
    for (size_t r = 0; r < model_.ropes.size(); ++r) {
      const std::ptrdiff_t at = static_cast<std::ptrdiff_t>(token) * (model_.ropes[r].dim / 2);
      rope_angles(model_.ropes[r], step.positions[token], work_.cosines[r] + at,
                  work_.sines[r] + at);
    }
  });
  lane.team.sync(lane.thread);
}

void FusedDecoder::attention_half(Lane& lane, int layer) {
  const LayerWeights& weights = model_.layers[static_cast<size_t>(layer)];
  const int tokens = lane.step.num_tokens;
  const bool post = model_.residual == Residual::post;
  const Rows input = prepare(lane, post ? Norm{} : weights.attn_norm, hidden_rows_of(tokens),
                             {&weights.q, &weights.k, &weights.v});
  query_key_value(lane, layer, input);
  lane.team.sync(lane.thread);
  attend(lane, layer);
  const int attention_cols = model_.attention.num_heads * model_.attention.head_dim;
  const Rows attended = prepare(
      lane, Norm{}, {work_.attention, attention_cols, attention_cols, tokens}, {&weights.o});
  project(lane, weights.o, attended, model_.residual == Residual::sandwich);
  lane.team.sync(lane.thread);
  if (model_.residual == Residual::sandwich) add_normalized_branch(lane, weights.post_attn_norm);
  if (post) normalize_hidden(lane, weights.attn_norm);
}

void FusedDecoder::feed_forward_half(Lane& lane, int layer) {
  const LayerWeights& weights = model_.layers[static_cast<size_t>(layer)];
  const bool post = model_.residual == Residual::post;
  const int tokens = lane.step.num_tokens;
  const Rows input = prepare(lane, post ? Norm{} : weights.ffn_norm, hidden_rows_of(tokens),
                             {&weights.up, model_.gated ? &weights.gate : &weights.up});
  gate_up(lane, weights, input);
  lane.team.sync(lane.thread);
  const MutableRows inner = work_.inner.view(model_.ffn_size);
  const Rows activated =
      weights.down.wants_token_rows()
          ? prepare(lane, Norm{}, {inner.values, inner.value_stride, model_.ffn_size, tokens},
                    {&weights.down})
          : inner.read_only();
  project(lane, weights.down, activated, model_.residual == Residual::sandwich);
  lane.team.sync(lane.thread);
  if (model_.residual == Residual::sandwich) add_normalized_branch(lane, weights.post_ffn_norm);
  if (post) normalize_hidden(lane, weights.ffn_norm);
}

Rows FusedDecoder::prepare(Lane& lane, const Norm& norm, const Source& source,
                           std::initializer_list<const PackedLinear*> consumers) {
  const RowForms forms(consumers);
  const bool alone = source.rows == 1;
  const MutableRows out = (alone ? lane.memory.input : work_.input).view(source.cols);
  const auto prepare_row = [&](int i) {
    const float* row = source.values + (source.row_of ? source.row_of[i] : i) * source.stride;
    if (norm) {
      normalize(norm, row, source.cols, out.value_row(i));
      row = out.value_row(i);
    }
    forms.make(row, i, out);
  };
  if (alone) {
    prepare_row(0);
  } else {
    lane.team.for_each(lane.thread, source.rows, prepare_row);
    lane.team.sync(lane.thread);
  }
  return out.read_only();
}

void FusedDecoder::query_key_value(Lane& lane, int layer, const Rows& input) {
  const LayerWeights& weights = model_.layers[static_cast<size_t>(layer)];
  const AttentionShape& shape = model_.attention;
  const int padded = shape.padded_head_dim(), tiles = padded / kTileRows;
  const int tokens = lane.step.num_tokens;
  const int heads = shape.num_heads + 2 * shape.num_kv_heads;
  const int block = rows_per_unit(weights.q, input, tokens);
  lane.team.for_each(lane.thread, ceil_div(tokens, block) * heads, [&](int unit) {
    const int first = unit / heads * block, last = std::min(first + block, tokens);
    int head = unit % heads;
    const PackedLinear* w = &weights.q;
    int in_matrix = head;
    if (head >= shape.num_heads) {
      w = head < shape.num_heads + shape.num_kv_heads ? &weights.k : &weights.v;
      in_matrix = (head - shape.num_heads) % shape.num_kv_heads;
    }
    auto* product = lane.memory.product.get<float>(static_cast<size_t>(block * padded));
    linear_tiles(*w, input, first, last, in_matrix * tiles, (in_matrix + 1) * tiles, product,
                 padded, lane.memory.linear);
    for (int token = first; token < last; ++token)
      finish_head(lane, layer, head, token, product + (token - first) * padded);
  });
}

// QK-norm, RoPE, and the row's way to the query buffer or the cache.
void FusedDecoder::finish_head(Lane& lane, int layer, int head, int token, float* row) {
  const LayerWeights& weights = model_.layers[static_cast<size_t>(layer)];
  const AttentionShape& shape = model_.attention;
  const int padded = shape.padded_head_dim();
  const bool is_query = head < shape.num_heads;
  const bool is_value = head >= shape.num_heads + shape.num_kv_heads;
  if (!is_value) {
    const Norm& norm = is_query ? weights.q_norm : weights.k_norm;
    if (norm) normalize(norm, row, shape.head_dim, row);
    if (weights.rope >= 0) {
      const auto r = static_cast<size_t>(weights.rope);
      const Rope& rope = model_.ropes[r];
      const std::ptrdiff_t at = static_cast<std::ptrdiff_t>(token) * (rope.dim / 2);
      rotate(rope, work_.cosines[r] + at, work_.sines[r] + at, row);
    }
  }
  if (is_query) {
    const std::ptrdiff_t at =
        (static_cast<std::ptrdiff_t>(token) * shape.num_heads + head) * padded;
    for (int d = 0; d < padded; d += 16)
      store16(work_.queries + at + d, mul(load16(row + d), set1(model_.attention_scale)));
    return;
  }
  const Step& step = lane.step;
  const int kv_head = (head - shape.num_heads) % shape.num_kv_heads;
  const int position = step.positions[token], slot = position % kBlockTokens;
  const int sequence = sequence_of_[static_cast<size_t>(token)];
  const int block = step.block_tables[sequence * step.table_width + position / kBlockTokens];
  append(cache_, layer, block, kv_head, slot, row, is_value);
}

void FusedDecoder::project(Lane& lane, const PackedLinear& w, const Rows& input, bool to_branch) {
  const int tokens = lane.step.num_tokens, width = model_.hidden_size;
  const int per_unit = tiles_per_unit(w, lane.team.size());
  const int units = ceil_div(w.tiles(), per_unit), block = rows_per_unit(w, input, tokens);
  lane.team.for_each(lane.thread, ceil_div(tokens, block) * units, [&](int unit) {
    const int first = unit / units * block, last = std::min(first + block, tokens);
    const int tile = unit % units * per_unit, end = std::min(tile + per_unit, w.tiles());
    const int cols = (end - tile) * kTileRows;
    auto* product = lane.memory.product.get<float>(static_cast<size_t>(block * cols));
    linear_tiles(w, input, first, last, tile, end, product, cols, lane.memory.linear);
    const int begin = tile * kTileRows, valid = std::min(cols, width - begin);
    for (int token = first; token < last; ++token) {
      const float* source = product + (token - first) * cols;
      if (to_branch) {
        std::copy_n(source, valid,
                    work_.branch + static_cast<std::ptrdiff_t>(token) * width + begin);
      } else {
        float* target = hidden_row(token) + begin;
        for (int k = 0; k < valid; ++k) target[k] += source[k];
      }
    }
  });
}

void FusedDecoder::gate_up(Lane& lane, const LayerWeights& weights, const Rows& input) {
  const int tokens = lane.step.num_tokens, size = model_.ffn_size;
  const int units = ceil_div(size, kFeedForwardCols),
            block = rows_per_unit(weights.up, input, tokens);
  const MutableRows out = work_.inner.view(size);
  lane.team.for_each(lane.thread, ceil_div(tokens, block) * units, [&](int unit) {
    const int first = unit / units * block, last = std::min(first + block, tokens);
    const int begin = unit % units * kFeedForwardCols;
    const int count = std::min(kFeedForwardCols, size - begin);
    const int tile = begin / kTileRows, end = tile + ceil_div(count, kTileRows);
    auto* up = lane.memory.product.get<float>(static_cast<size_t>(2 * block * kFeedForwardCols));
    float* gate = up + block * kFeedForwardCols;
    linear_tiles(weights.up, input, first, last, tile, end, up, kFeedForwardCols,
                 lane.memory.linear);
    if (model_.gated)
      linear_tiles(weights.gate, input, first, last, tile, end, gate, kFeedForwardCols,
                   lane.memory.linear);
    for (int token = first; token < last; ++token) {
      float* row = up + (token - first) * kFeedForwardCols;
      const float* gate_row = gate + (token - first) * kFeedForwardCols;
      for (int k = 0; k < round_up(count, kTileRows); k += 16) {
        const F32x16 x = load16(row + k);
        store16(row + k, model_.gated ? mul(activate(model_.activation, load16(gate_row + k)), x)
                                      : activate(model_.activation, x));
      }
      const LinearInput& wanted = weights.down.input;
      if (wanted.is_transformed() && !wanted.is_whole_row())
        transform_features(wanted, begin, count, row);
      if (weights.down.wants_quantized_input())
        quantize_features(row, begin, count, out.record(token), out.layout);
      else
        std::copy_n(row, count, out.value_row(token) + begin);
    }
  });
}

void FusedDecoder::add_normalized_branch(Lane& lane, const Norm& norm) {
  lane.team.for_each(lane.thread, lane.step.num_tokens, [&](int token) {
    float* branch = work_.branch + static_cast<std::ptrdiff_t>(token) * model_.hidden_size;
    normalize(norm, branch, model_.hidden_size, branch);
    float* row = hidden_row(token);
    for (int k = 0; k < model_.hidden_size; ++k) row[k] += branch[k];
  });
  lane.team.sync(lane.thread);
}

void FusedDecoder::normalize_hidden(Lane& lane, const Norm& norm) {
  lane.team.for_each(lane.thread, lane.step.num_tokens, [&](int token) {
    normalize(norm, hidden_row(token), model_.hidden_size, hidden_row(token));
  });
  lane.team.sync(lane.thread);
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

void FusedDecoder::logits(Lane& lane) {
  const Step& step = lane.step;
  if (step.num_logit_rows == 0) return;
  const PackedLinear& head = model_.head;
  const int rows = step.num_logit_rows;
  const Rows input = prepare(
      lane, model_.final_norm,
      {work_.hidden, model_.hidden_size, model_.hidden_size, rows, step.logit_rows}, {&head});
  const int per_unit = tiles_per_unit(head, lane.team.size());
  const int units = ceil_div(head.tiles(), per_unit), block = rows_per_unit(head, input, rows);
  lane.team.for_each(lane.thread, ceil_div(rows, block) * units, [&](int unit) {
    const int first = unit / units * block, last = std::min(first + block, rows);
    const int tile = unit % units * per_unit, end = std::min(tile + per_unit, head.tiles());
    const int cols = (end - tile) * kTileRows, begin = tile * kTileRows;
    auto* product = lane.memory.product.get<float>(static_cast<size_t>(block * cols));
    linear_tiles(head, input, first, last, tile, end, product, cols, lane.memory.linear);
    for (int row = first; row < last; ++row) {
      float* source = product + (row - first) * cols;
      if (model_.logit_softcap > 0.0F) {
        const F32x16 cap = set1(model_.logit_softcap);
        for (int k = 0; k < cols; k += 16)
          store16(source + k, mul(cap, tanh(div(load16(source + k), cap))));
      }
      std::copy_n(source, std::min(cols, model_.vocab_size - begin),
                  step.logits + static_cast<std::ptrdiff_t>(row) * model_.vocab_size + begin);
    }
  });
}

}  // namespace fuserve::FUSERVE_ISA
