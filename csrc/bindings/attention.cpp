#include "bindings/attention.h"

#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <optional>

#include "runtime/kernels.h"

using namespace fuserve;
using namespace fuserve::bindings;

void bind_attention(nb::module_& m) {
  m.attr("BLOCK_TOKENS") = kBlockTokens;
  nb::class_<CacheHandle>(m, "KVCache")
      .def(
          "__init__",
          [](CacheHandle* self, int num_layers, int num_blocks, int num_kv_heads, int head_dim,
             int type) {
            require(num_layers > 0 && num_blocks > 0 && num_kv_heads > 0 && head_dim > 0,
                    "layers, blocks, heads and head_dim must be positive");
            require(type >= 0 && type <= static_cast<int>(CacheType::i4), "unknown cache type");
            KVCache cache;
            cache.type = static_cast<CacheType>(type);
            cache.num_layers = num_layers;
            cache.num_blocks = num_blocks;
            cache.num_kv_heads = num_kv_heads;
            cache.padded_head_dim = round_up(head_dim, kTileRows);
            Buffer memory(cache.bytes());
            cache.data = memory.as<std::byte>();
            new (self) CacheHandle{std::move(memory), cache};
          },
          nb::arg("num_layers"), nb::arg("num_blocks"), nb::arg("num_kv_heads"),
          nb::arg("head_dim"), nb::arg("type"))
      .def_prop_ro("bytes", [](const CacheHandle& self) { return self.memory.bytes(); })
      .def(
          "copy_block",
          [](CacheHandle& self, int source, int target) {
            const KVCache& cache = self.cache;
            require(source >= 0 && source < cache.num_blocks && target >= 0 &&
                        target < cache.num_blocks && source != target,
                    "source and target must be two blocks of the cache");
            const size_t bytes = cache.block_bytes();
            std::memcpy(cache.data + bytes * static_cast<size_t>(target),
                        cache.data + bytes * static_cast<size_t>(source), bytes);
          },
          nb::arg("source"), nb::arg("target"))
      .def(
          "fill",
          [](CacheHandle& self, int byte) {
            std::memset(self.memory.as<char>(), byte, self.memory.bytes());
          },
          "Sets every byte: tests poison the cache with it.");

  m.def(
      "attention",
      [](const std::string& isa, CacheHandle& cache, int layer, Array<const float, 3> queries,
         Array<const float, 3> keys, Array<const float, 3> values,
         Array<const std::int32_t, 1> block_table, int head_dim, int first_position, int window,
         float softcap, std::optional<Array<const float, 1>> slopes, Array<float, 3> out) {
        AttentionShape shape;
        shape.num_heads = static_cast<int>(queries.shape(1));
        shape.num_kv_heads = static_cast<int>(keys.shape(1));
        shape.head_dim = head_dim;
        shape.softcap = softcap;
        const auto padded = static_cast<size_t>(shape.padded_head_dim());
        const size_t tokens = queries.shape(0);
        require(tokens > 0 && first_position >= 0 && window >= 0 && layer >= 0 &&
                    layer < cache.cache.num_layers,
                "layer, first_position or window is out of range");
        require(shape.num_kv_heads == cache.cache.num_kv_heads &&
                    static_cast<int>(padded) == cache.cache.padded_head_dim &&
                    shape.num_heads % shape.num_kv_heads == 0,
                "heads or head_dim do not fit the cache");
        require(queries.shape(2) == padded && keys.shape(2) == padded &&
                    values.shape(2) == padded && values.shape(1) == keys.shape(1) &&
                    keys.shape(0) == tokens && values.shape(0) == tokens,
                "queries, keys and values must be [tokens, heads, padded head dim]");
        require(out.shape(0) == tokens && out.shape(1) == queries.shape(1) &&
                    out.shape(2) == static_cast<size_t>(head_dim),
                "out must be [tokens, heads, head dim]");
        require(!slopes || slopes->size() == queries.shape(1), "slopes must be [heads]");
        const size_t last_block = (static_cast<size_t>(first_position) + tokens - 1) / kBlockTokens;
        require(last_block < block_table.size(), "block_table is too short");
        for (size_t i = 0; i <= last_block; ++i)
          require(block_table.data()[i] >= 0 && block_table.data()[i] < cache.cache.num_blocks,
                  "block_table names a block outside the cache");
        shape.alibi_slopes = slopes ? slopes->data() : nullptr;
        AttentionTask task;
        task.layer = layer;
        task.window = window;
        task.first_position = first_position;
        task.tokens = static_cast<int>(tokens);
        task.block_table = block_table.data();
        task.queries = queries.data();
        task.query_stride = static_cast<std::ptrdiff_t>(queries.shape(1) * padded);
        const nb::gil_scoped_release release;
        kernels(isa).attention(shape, cache.cache, task, keys.data(), values.data(), out.data());
      },
      nb::arg("isa"), nb::arg("cache"), nb::arg("layer"), nb::arg("queries"), nb::arg("keys"),
      nb::arg("values"), nb::arg("block_table"), nb::arg("head_dim"), nb::arg("first_position"),
      nb::arg("window"), nb::arg("softcap"), nb::arg("slopes").none(), nb::arg("out"));
}
