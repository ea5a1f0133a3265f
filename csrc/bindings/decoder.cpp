#include "decoder/decoder.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <optional>

#include "bindings/attention.h"
#include "bindings/exchange.h"
#include "bindings/linear.h"
#include "runtime/kernels.h"

using namespace fuserve;
using namespace fuserve::bindings;

namespace {

// A decoder with everything its weights point into.
struct DecoderHandle {
  std::unique_ptr<Decoder> decoder;
  DecoderModel model;
  std::unique_ptr<Exchange> exchange;  // where it is not shared memory
  std::vector<float> slopes;
  std::vector<nb::object> owners;
  int num_blocks = 0;
  int num_positions = 0;  // rows of the learned position table; 0: none
};

// Reads the attributes of the Python dataclasses in fuserve.decoder.native.
class ModelReader {
 public:
  explicit ModelReader(std::vector<nb::object>& owners) : owners_(owners) {}

  template <class T>
  static T get(const nb::handle& from, const char* name) {
    return nb::cast<T>(from.attr(name));
  }

  PackedLinear linear(const nb::handle& from, const char* name, int rows, int cols) {
    const nb::object value = from.attr(name);
    if (value.is_none()) return {};
    const auto& handle = nb::cast<const LinearHandle&>(value);
    require(handle.weights.rows == rows && handle.weights.cols == cols,
            std::string(name) + " has the wrong shape");
    owners_.push_back(value);
    return handle.weights;
  }

  Norm norm(const nb::handle& from, const char* name, int size) {
    const nb::object value = from.attr(name);
    if (value.is_none()) return {};
    const auto& handle = nb::cast<const NormHandle&>(value);
    require(nb::len(handle.weight) == static_cast<size_t>(size),
            std::string(name) + " has the wrong size");
    owners_.push_back(value);
    return handle.norm;
  }

  // A NativeRowSplit of fuserve.decoder.packed_reader.
  RowSplit row_split(const nb::handle& from, const char* name, int rows, int cols) {
    const nb::object value = from.attr(name);
    RowSplit split;
    for (const nb::handle part : value.attr("parts")) {
      const auto& handle = nb::cast<const LinearHandle&>(part);
      require(handle.weights.rows == rows && handle.weights.bias == nullptr,
              std::string(name) + " has a part of the wrong shape, or with a bias");
      split.parts.push_back(handle.weights);
      owners_.push_back(nb::borrow(part));
    }
    require(!split.parts.empty() && split.parts.size() <= kMostParts && split.cols() == cols,
            std::string(name) + " has the wrong shape");
    const nb::object bias = value.attr("bias");
    if (bias.is_none()) return split;
    const auto values = nb::cast<Array<const float, 1>>(bias);
    require(values.size() == static_cast<size_t>(split.parts.front().tiles() * kTileRows),
            std::string(name) + "'s bias must have 16 values a tile");
    split.bias = values.data();
    owners_.push_back(bias);
    return split;
  }

  static Rope rope(const nb::handle& from) {
    Rope rope;
    rope.dim = get<int>(from, "dim");
    rope.interleaved = get<bool>(from, "interleaved");
    rope.attention_factor = get<float>(from, "attention_factor");
    rope.inverse_frequencies = get<std::vector<float>>(from, "inverse_frequencies");
    rope.dynamic_factor = get<double>(from, "dynamic_factor");
    rope.dynamic_base = get<double>(from, "dynamic_base");
    rope.dynamic_from = get<int>(from, "dynamic_from");
    require(static_cast<int>(rope.inverse_frequencies.size()) == rope.dim / 2,
            "inverse_frequencies must be [dim / 2]");
    return rope;
  }

  // Linears of one input must agree on what is done to it.
  static void check_inputs(std::initializer_list<const PackedLinear*> consumers) {
    const LinearInput* token = nullptr;
    const LinearInput* transform = nullptr;
    for (const PackedLinear* w : consumers) {
      if (w->data == nullptr) continue;
      const LinearInput& input = w->input;
      require(!transform ||
                  (input.shift == transform->shift && input.multiplier == transform->multiplier),
              "linears of one input must shift and scale it alike");
      transform = &input;
      if (!input.is_whole_row()) continue;
      require(!token || input == *token, "linears of one input must quantize its rows alike");
      token = &input;
    }
  }

  LayerWeights layer(const nb::handle& from, const DecoderModel& model) {
    const AttentionShape& a = model.attention;
    const int hidden = model.hidden_size, inner = a.num_heads * a.head_dim;
    const int kv = a.num_kv_heads * a.head_dim;
    LayerWeights w;
    w.attn_norm = norm(from, "attn_norm", hidden);
    w.ffn_norm = norm(from, "ffn_norm", hidden);
    w.post_attn_norm = norm(from, "post_attn_norm", hidden);
    w.post_ffn_norm = norm(from, "post_ffn_norm", hidden);
    w.q_norm = norm(from, "q_norm", a.head_dim);
    w.k_norm = norm(from, "k_norm", a.head_dim);
    w.q = linear(from, "q", inner, hidden);
    w.k = linear(from, "k", kv, hidden);
    w.v = linear(from, "v", kv, hidden);
    w.o = row_split(from, "o", hidden, inner);
    w.gate = linear(from, "gate", model.ffn_size, hidden);
    w.up = linear(from, "up", model.ffn_size, hidden);
    w.down = row_split(from, "down", hidden, model.ffn_size);
    check_inputs({&w.q, &w.k, &w.v});
    check_inputs({&w.gate, &w.up});
    for (const PackedLinear* head_wise : {&w.q, &w.k, &w.v})
      require(head_wise->rows_per_group() == a.head_dim, "q, k and v must be packed by head");
    require(w.up.data != nullptr && (w.gate.data != nullptr) == model.gated,
            "a layer lacks a weight");
    for (size_t part = 1; part < w.down.parts.size(); ++part)
      require(w.down.parts[part - 1].cols % kTileRows == 0, "down must be cut at whole tiles");
    w.rope = get<int>(from, "rope");
    w.window = get<int>(from, "window");
    require(w.rope < static_cast<int>(model.ropes.size()) && w.window >= 0,
            "rope or window is out of range");
    return w;
  }

 private:
  std::vector<nb::object>& owners_;
};

void read_model(DecoderHandle& self, const nb::handle& from) {
  ModelReader reader(self.owners);
  DecoderModel& model = self.model;
  model.hidden_size = reader.get<int>(from, "hidden_size");
  model.vocab_size = reader.get<int>(from, "vocab_size");
  model.vocab_sizes = reader.get<std::vector<int>>(from, "vocab_sizes");
  model.first_token = reader.get<int>(from, "first_token");
  model.ffn_size = reader.get<int>(from, "ffn_size");
  model.attention.num_heads = reader.get<int>(from, "num_heads");
  model.attention.num_kv_heads = reader.get<int>(from, "num_kv_heads");
  model.attention.head_dim = reader.get<int>(from, "head_dim");
  model.attention.softcap = reader.get<float>(from, "score_softcap");
  self.slopes = reader.get<std::vector<float>>(from, "alibi_slopes");
  model.attention.alibi_slopes = self.slopes.empty() ? nullptr : self.slopes.data();
  model.attention_scale = reader.get<float>(from, "attention_scale");
  model.gated = reader.get<bool>(from, "gated");
  model.activation = static_cast<Activation>(reader.get<int>(from, "activation"));
  model.residual = static_cast<Residual>(reader.get<int>(from, "residual"));
  model.embedding_scale = reader.get<float>(from, "embedding_scale");
  model.logit_softcap = reader.get<float>(from, "logit_softcap");
  model.embedding_norm = reader.norm(from, "embedding_norm", model.hidden_size);
  model.final_norm = reader.norm(from, "final_norm", model.hidden_size);
  const int rank = model.exchange != nullptr ? model.exchange->rank() : 0;
  require(static_cast<int>(model.vocab_sizes.size()) ==
              (model.exchange != nullptr ? model.exchange->size() : 1),
          "vocab_sizes must be as many as ranks");
  const int share = model.vocab_sizes[static_cast<size_t>(rank)];
  model.embedding = reader.linear(from, "embedding", share, model.hidden_size);
  model.head = reader.linear(from, "head", share, model.hidden_size);
  if (model.exchange != nullptr)
    for (const int width : model.vocab_sizes)
      require(model.exchange->capacity() >= static_cast<size_t>(std::max(width, model.hidden_size)),
              "the ranks' shared memory is too small for a row of logits or hidden states");
  const nb::object positions = from.attr("position_embedding");
  if (!positions.is_none()) {
    const auto table = nb::cast<Array<const float, 2>>(positions);
    require(table.shape(1) == static_cast<size_t>(model.hidden_size),
            "position_embedding must be [positions, hidden]");
    model.position_embedding = table.data();
    self.num_positions = static_cast<int>(table.shape(0));
    self.owners.push_back(positions);
  }
  for (const nb::handle rope : from.attr("ropes")) model.ropes.push_back(reader.rope(rope));
  for (const nb::handle layer : from.attr("layers"))
    model.layers.push_back(reader.layer(layer, model));
  require(!model.layers.empty(), "a decoder has at least one layer");
  const auto cut_alike = [](const RowSplit& a, const RowSplit& b) {
    return std::equal(
        a.parts.begin(), a.parts.end(), b.parts.begin(), b.parts.end(),
        [](const PackedLinear& x, const PackedLinear& y) { return x.cols == y.cols; });
  };
  for (const LayerWeights& layer : model.layers)
    require(cut_alike(layer.o, model.layers.front().o) &&
                cut_alike(layer.down, model.layers.front().down),
            "all layers must be cut into the same parts");
}

// What the ranks exchange through: a SharedExchange, a Communicator, or None.
void read_exchange(DecoderHandle& self, const nb::object& end) {
  if (end.is_none()) return;
  self.owners.push_back(end);
  if (nb::isinstance<ExchangeHandle>(end)) {
    self.model.exchange = &nb::cast<ExchangeHandle&>(end).exchange;
    return;
  }
  self.exchange = std::make_unique<CommunicatorExchange>(end);
  self.model.exchange = self.exchange.get();
}

void check_sequences(const DecoderHandle& self, const Step& step) {
  require(step.query_starts[0] == 0 && step.query_starts[step.num_sequences] == step.num_tokens,
          "query_starts must run from 0 to the number of tokens");
  for (int s = 0; s < step.num_sequences; ++s) {
    const int first = step.query_starts[s], last = step.query_starts[s + 1];
    require(first <= last, "query_starts must not decrease");
    for (int t = first; t < last; ++t) {
      require(step.positions[t] >= 0 && step.positions[t] == step.positions[first] + (t - first),
              "positions of a sequence must be consecutive");
      require(self.num_positions == 0 || step.positions[t] < self.num_positions,
              "a position is beyond the model's learned positions");
      require(step.tokens[t] >= 0 && step.tokens[t] < self.model.vocab_size,
              "a token is outside the vocabulary");
    }
    if (first == last) continue;
    const int blocks = step.positions[last - 1] / kBlockTokens + 1;
    require(blocks <= step.table_width, "a block table is too short for its sequence");
    for (int b = 0; b < blocks; ++b) {
      const int block = step.block_tables[s * step.table_width + b];
      require(block >= 0 && block < self.num_blocks, "a block table names an unknown block");
    }
  }
  for (int r = 0; r < step.num_logit_rows; ++r)
    require(step.logit_rows[r] >= 0 && step.logit_rows[r] < step.num_tokens,
            "a logit row is out of range");
  for (int r = 0; r < step.num_hidden_rows; ++r)
    require(step.hidden_rows[r] >= 0 && step.hidden_rows[r] < step.num_tokens,
            "a hidden row is out of range");
}

}  // namespace

void bind_decoder(nb::module_& m) {
  nb::class_<DecoderHandle>(m, "Decoder")
      .def(
          "__init__",
          [](DecoderHandle* self, const std::string& isa, nb::handle model, nb::object cache,
             nb::object exchange) {
            const auto& kv = nb::cast<const CacheHandle&>(cache);
            new (self) DecoderHandle();
            try {
              read_exchange(*self, exchange);
              read_model(*self, model);
              require(kv.cache.num_kv_heads == self->model.attention.num_kv_heads &&
                          kv.cache.padded_head_dim == self->model.attention.padded_head_dim() &&
                          kv.cache.num_layers == static_cast<int>(self->model.layers.size()),
                      "the cache does not fit the model");
              self->owners.push_back(cache);
              self->num_blocks = kv.cache.num_blocks;
              self->decoder = kernels(isa).make_decoder(self->model, kv.cache);
            } catch (...) {
              self->~DecoderHandle();
              throw;
            }
          },
          nb::arg("isa"), nb::arg("model"), nb::arg("cache"), nb::arg("exchange").none())
      .def(
          "step",
          [](DecoderHandle& self, ThreadPool& pool, Array<const std::int32_t, 1> tokens,
             Array<const std::int32_t, 1> positions, Array<const std::int32_t, 1> query_starts,
             Array<const std::int32_t, 2> block_tables, Array<const std::int32_t, 1> logit_rows,
             Array<float, 2> logits, Array<const std::int32_t, 1> hidden_rows,
             Array<float, 2> hidden, std::optional<Array<const float, 2>> received,
             Array<float, 2> passed) {
            const DecoderModel& model = self.model;
            const bool is_last = model.is_last_stage();
            const auto width = static_cast<size_t>(model.hidden_size);
            Step step;
            step.num_tokens = static_cast<int>(tokens.size());
            step.num_sequences = static_cast<int>(query_starts.size()) - 1;
            step.num_logit_rows = static_cast<int>(logit_rows.size());
            step.table_width = static_cast<int>(block_tables.shape(1));
            step.tokens = tokens.data();
            step.positions = positions.data();
            step.query_starts = query_starts.data();
            step.block_tables = block_tables.data();
            step.logit_rows = logit_rows.data();
            step.logits = logits.data();
            step.num_hidden_rows = is_last ? static_cast<int>(hidden_rows.size()) : 0;
            step.hidden_rows = hidden_rows.data();
            step.hidden = hidden.data();
            step.received = received ? received->data() : nullptr;
            step.passed = passed.data();
            require(step.num_tokens > 0 && positions.size() == tokens.size(),
                    "positions must be as many as tokens, at least one");
            require(step.num_sequences >= 1 &&
                        block_tables.shape(0) == static_cast<size_t>(step.num_sequences),
                    "block_tables must have a row for each sequence");
            require(logits.shape(0) == (model.gets_logits() ? logit_rows.size() : 0) &&
                        logits.shape(1) == static_cast<size_t>(model.vocab_size),
                    "logits must be [rows, vocabulary], without rows where there are none");
            require(hidden.shape(0) == static_cast<size_t>(step.num_hidden_rows) &&
                        hidden.shape(1) == width,
                    "hidden must be [rows, hidden size]");
            require(received.has_value() != model.is_first_stage() &&
                        (!received ||
                         (received->shape(0) == tokens.size() && received->shape(1) == width)),
                    "hidden states of the stage before must be [tokens, hidden size], and none "
                    "for the first");
            require(passed.shape(0) == (is_last ? 0 : tokens.size()) && passed.shape(1) == width,
                    "hidden states for the stage after must be [tokens, hidden size]");
            check_sequences(self, step);
            const nb::gil_scoped_release release;
            self.decoder->step(step, pool);
          },
          nb::arg("pool"), nb::arg("tokens"), nb::arg("positions"), nb::arg("query_starts"),
          nb::arg("block_tables"), nb::arg("logit_rows"), nb::arg("logits"), nb::arg("hidden_rows"),
          nb::arg("hidden"), nb::arg("received").none(), nb::arg("passed"));
}
