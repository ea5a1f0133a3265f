#include "decoder/fused_decoder.h"

#include <algorithm>

#include "attention/append.h"
#include "decoder/activation.h"
#include "decoder/meeting.h"
#include "decoder/rope.h"
#include "decoder/tree_sum.h"
#include "linear/linear.h"
#include "linear/row_forms.h"
#include "linear/units.h"
#include "norm/norm.h"

namespace fuserve::FUSERVE_ISA {
namespace {

constexpr int kFeedForwardCols = 128;  // the largest group that activation sums are kept for

}  // namespace

FusedDecoder::FusedDecoder(DecoderModel model, KVCache cache)
    : model_(std::move(model)), cache_(cache) {
  int first = 0;
  const std::vector<PackedLinear>& parts = model_.layers.front().down.parts;
  for (int part = 0; part < static_cast<int>(parts.size()); ++part) {
    const int cols = parts[static_cast<size_t>(part)].cols;
    for (int begin = 0; begin < cols; begin += kFeedForwardCols)
      feed_forward_units_.push_back(
          {part, begin, first + begin, std::min(kFeedForwardCols, cols - begin)});
    first += cols;
  }
}

void FusedDecoder::step(const Step& step, ThreadPool& pool) {
  work_.reserve(model_, step.num_tokens, pool.size());
  plan_attention(step, pool.size());
  if (model_.exchange != nullptr) {
    const int share = *std::max_element(model_.vocab_sizes.begin(), model_.vocab_sizes.end());
    const auto floats = [](int rows, int width) {
      return static_cast<size_t>(rows) * static_cast<size_t>(width);
    };
    model_.exchange->reserve(
        std::max(floats(std::min(step.num_tokens, rows_per_exchange(model_.hidden_size)),
                        model_.hidden_size),
                 floats(std::min(step.num_logit_rows, rows_per_exchange(share)), share)));
  }
  pool.run([&](Team& team, int thread) {
    Lane lane{team, thread, step, work_.threads[static_cast<size_t>(thread)]};
    run(lane);
  });
  failed_ = false;
  if (failure_) std::rethrow_exception(std::exchange(failure_, nullptr));
}

void FusedDecoder::run(Lane& lane) {
  model_.is_first_stage() ? embed(lane) : receive(lane);
  for (int layer = 0; layer < static_cast<int>(model_.layers.size()) && !failed_; ++layer) {
    attention_half(lane, layer);
    if (failed_) return;
    feed_forward_half(lane, layer);
  }
  if (failed_) return;
  if (!model_.is_last_stage()) return pass_on(lane);
  hidden_states(lane);
  logits(lane);
}

int FusedDecoder::rows_per_exchange(int width) const {
  constexpr size_t kMost = 1U << 20U;
  const size_t rows = model_.exchange->capacity() / static_cast<size_t>(width);
  return static_cast<int>(std::clamp<size_t>(rows, 1, kMost));
}

void FusedDecoder::attention_half(Lane& lane, int layer) {
  const LayerWeights& weights = model_.layers[static_cast<size_t>(layer)];
  const bool post = model_.residual == Residual::post;
  const Rows input =
      prepare(lane, post ? Norm{} : weights.attn_norm, hidden_rows_of(lane.step.num_tokens),
              {&weights.q, &weights.k, &weights.v});
  query_key_value(lane, layer, input);
  lane.team.sync(lane.thread);
  attend(lane, layer);
  PartSources sources;
  const float* features = work_.attention;
  for (size_t part = 0; part < weights.o.parts.size(); ++part) {
    sources[part] = {features, model_.attention.num_heads * model_.attention.head_dim};
    features += weights.o.parts[part].cols;
  }
  project(lane, weights.o, prepare_parts(lane, sources, weights.o));
  lane.team.sync(lane.thread);
  if (model_.residual == Residual::sandwich) add_normalized_branch(lane, weights.post_attn_norm);
  if (post) normalize_hidden(lane, weights.attn_norm);
}

void FusedDecoder::feed_forward_half(Lane& lane, int layer) {
  const LayerWeights& weights = model_.layers[static_cast<size_t>(layer)];
  const bool post = model_.residual == Residual::post;
  const Rows input =
      prepare(lane, post ? Norm{} : weights.ffn_norm, hidden_rows_of(lane.step.num_tokens),
              {&weights.up, model_.gated ? &weights.gate : &weights.up});
  gate_up(lane, weights, input);
  lane.team.sync(lane.thread);
  project(lane, weights.down, activated(lane, weights.down));
  lane.team.sync(lane.thread);
  if (model_.residual == Residual::sandwich) add_normalized_branch(lane, weights.post_ffn_norm);
  if (post) normalize_hidden(lane, weights.ffn_norm);
}

// What gate_up has left, as the down projection wants it: whole rows have to wait for all of them.
FusedDecoder::PartRows FusedDecoder::activated(Lane& lane, const RowSplit& down) {
  PartRows rows;
  PartSources sources;
  for (size_t part = 0; part < down.parts.size(); ++part) {
    const MutableRows inner = work_.inner[part].view(down.parts[part].cols);
    rows[part] = inner.read_only();
    sources[part] = {inner.values, inner.value_stride};
  }
  return down.parts.front().wants_token_rows() ? prepare_parts(lane, sources, down) : rows;
}

FusedDecoder::PartRows FusedDecoder::prepare_parts(Lane& lane, const PartSources& sources,
                                                   const RowSplit& split) {
  const int tokens = lane.step.num_tokens;
  const bool alone = tokens == 1;
  RowBuffer* buffers = alone ? lane.memory.input : work_.input;
  PartRows rows;
  std::array<MutableRows, kMostParts> out;
  for (size_t part = 0; part < split.parts.size(); ++part) {
    out[part] = buffers[part].view(split.parts[part].cols);
    rows[part] = out[part].read_only();
  }
  const auto prepare_row = [&](int i) {
    for (size_t part = 0; part < split.parts.size(); ++part)
      RowForms({&split.parts[part]})
          .make(sources[part].first + i * sources[part].second, i, out[part]);
  };
  if (alone) {
    prepare_row(0);
  } else {
    lane.team.for_each(lane.thread, tokens, prepare_row);
    lane.team.sync(lane.thread);
  }
  return rows;
}

Rows FusedDecoder::prepare(Lane& lane, const Norm& norm, const Source& source,
                           std::initializer_list<const PackedLinear*> consumers) {
  const RowForms forms(consumers);
  const bool alone = source.rows == 1;
  const MutableRows out = (alone ? lane.memory.input : work_.input)[0].view(source.cols);
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

template <class F>
void FusedDecoder::product_rows(Lane& lane, const RowSplit& split, const PartRows& input, int first,
                                int last, F&& f) {
  const PackedLinear& w = split.parts.front();
  const int num_parts = static_cast<int>(split.parts.size()), rows = last - first;
  const int per_unit = tiles_per_unit(w, lane.team.size());
  const int units = ceil_div(w.tiles(), per_unit), block = rows_per_unit(w, input[0], rows);
  lane.team.for_each(lane.thread, ceil_div(rows, block) * units, [&](int unit) {
    const int begin = first + unit / units * block, end = std::min(begin + block, last);
    const int tile = unit % units * per_unit, end_tile = std::min(tile + per_unit, w.tiles());
    const int cols = (end_tile - tile) * kTileRows;
    auto* product = lane.memory.product.get<float>(static_cast<size_t>(num_parts * block * cols));
    std::array<const float*, kMostParts> products;
    for (int part = 0; part < num_parts; ++part) {
      const auto p = static_cast<size_t>(part);
      float* out = product + part * block * cols;
      linear_tiles(split.parts[p], input[p], begin, end, tile, end_tile, out, cols,
                   lane.memory.linear);
      products[p] = out;
    }
    const int col = tile * kTileRows, valid = std::min(cols, w.rows - col);
    for (int row = begin; row < end; ++row)
      tree_sum(products.data(), num_parts, (row - begin) * cols, valid,
               [&](int k, int n, F32x16 sum) { f(row, col + k, n, sum); });
  });
}

void FusedDecoder::project(Lane& lane, const RowSplit& split, const PartRows& input) {
  const int tokens = lane.step.num_tokens, width = model_.hidden_size;
  const bool to_branch = model_.residual == Residual::sandwich;
  float* output = to_branch ? work_.branch : work_.hidden;
  const auto deliver = [&](int token, int col, int n, F32x16 sum) {
    if (split.bias != nullptr) sum = add(sum, load16(split.bias + col));
    float* target = output + static_cast<std::ptrdiff_t>(token) * width + col;
    if (n == 16)
      store16(target, to_branch ? sum : add(load16(target), sum));
    else
      store_n(target, to_branch ? sum : add(load_n(target, n), sum), n);
  };
  if (model_.exchange == nullptr) return product_rows(lane, split, input, 0, tokens, deliver);
  // The product of all rows at once reads the weights less often than one for each exchange.
  const int chunk = rows_per_exchange(width);
  float* sums = tokens <= chunk ? model_.exchange->part() : work_.branch;
  product_rows(lane, split, input, 0, tokens, [&](int row, int col, int n, F32x16 sum) {
    float* target = sums + static_cast<std::ptrdiff_t>(row) * width + col;
    n == 16 ? store16(target, sum) : store_n(target, sum, n);
  });
  for (int first = 0; first < tokens; first += chunk) {
    const int rows = std::min(chunk, tokens - first);
    if (sums == work_.branch) {
      lane.team.sync(lane.thread);
      lane.team.for_each(lane.thread, rows, [&](int row) {
        std::copy_n(sums + static_cast<std::ptrdiff_t>(first + row) * width, width,
                    model_.exchange->part() + static_cast<std::ptrdiff_t>(row) * width);
      });
    }
    const auto count = static_cast<size_t>(rows) * static_cast<size_t>(width);
    if (!meet(lane, [&](Exchange& exchange) { exchange.sum(count); })) return;
    add_ranks(lane, rows,
              [&](int row, int col, int n, F32x16 sum) { deliver(first + row, col, n, sum); });
  }
}

void FusedDecoder::gate_up(Lane& lane, const LayerWeights& weights, const Rows& input) {
  const int tokens = lane.step.num_tokens;
  const int units = static_cast<int>(feed_forward_units_.size()),
            block = rows_per_unit(weights.up, input, tokens);
  std::array<MutableRows, kMostParts> parts;
  for (size_t part = 0; part < weights.down.parts.size(); ++part)
    parts[part] = work_.inner[part].view(weights.down.parts[part].cols);
  lane.team.for_each(lane.thread, ceil_div(tokens, block) * units, [&](int unit) {
    const int first = unit / units * block, last = std::min(first + block, tokens);
    const FeedForwardUnit& features = feed_forward_units_[static_cast<size_t>(unit % units)];
    const int count = features.count;
    const int tile = features.first / kTileRows, end = tile + ceil_div(count, kTileRows);
    auto* up = lane.memory.product.get<float>(static_cast<size_t>(2 * block * kFeedForwardCols));
    float* gate = up + block * kFeedForwardCols;
    linear_tiles(weights.up, input, first, last, tile, end, up, kFeedForwardCols,
                 lane.memory.linear);
    if (model_.gated)
      linear_tiles(weights.gate, input, first, last, tile, end, gate, kFeedForwardCols,
                   lane.memory.linear);
    const PackedLinear& down = weights.down.parts[static_cast<size_t>(features.part)];
    const MutableRows& out = parts[static_cast<size_t>(features.part)];
    for (int token = first; token < last; ++token) {
      float* row = up + (token - first) * kFeedForwardCols;
      const float* gate_row = gate + (token - first) * kFeedForwardCols;
      for (int k = 0; k < round_up(count, kTileRows); k += 16) {
        const F32x16 x = load16(row + k);
        store16(row + k, model_.gated ? mul(activate(model_.activation, load16(gate_row + k)), x)
                                      : activate(model_.activation, x));
      }
      if (down.input.is_transformed() && !down.input.is_whole_row())
        transform_features(down.input, features.begin, count, row);
      if (down.wants_quantized_input())
        quantize_features(row, features.begin, count, out.record(token), out.layout);
      else
        std::copy_n(row, count, out.value_row(token) + features.begin);
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

}  // namespace fuserve::FUSERVE_ISA
