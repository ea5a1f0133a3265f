// Python binding of the sampler: argument checks, nothing else.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/vector.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <span>
#include <stdexcept>
#include <string>

#include "bindings/bindings.h"
#include "sampling/sampler.h"

namespace nb = nanobind;

namespace {

using fuserve::sampling::Choice;
using fuserve::sampling::Options;

template <typename T>
using Vector = nb::ndarray<const T, nb::ndim<1>, nb::c_contig, nb::device::cpu>;

template <typename T>
std::span<const T> view(const Vector<T>& array) {
  return {array.data(), array.shape(0)};
}

void require(bool holds, const char* message) {
  if (!holds) {
    throw std::invalid_argument(message);
  }
}

void require_row(std::span<const float> logits) {
  require(!logits.empty(), "logits must not be empty");
  require(logits.size() <= static_cast<std::size_t>(std::numeric_limits<std::int32_t>::max()),
          "logits must have fewer than 2^31 elements");
}

void require_ids(std::span<const std::int32_t> ids, std::size_t vocabulary, const char* name) {
  for (const std::int32_t id : ids) {
    if (id < 0 || static_cast<std::size_t>(id) >= vocabulary) {
      throw std::invalid_argument(std::string(name) + " must lie in [0, " +
                                  std::to_string(vocabulary) + "), got " + std::to_string(id));
    }
  }
}

void require_options(const Options& options, std::size_t vocabulary, double u) {
  const auto& penalties = options.penalties;
  require(options.temperature == 0.0F ||
              (options.temperature >= 1e-6F && std::isfinite(options.temperature)),
          "temperature must be 0 or in [1e-6, inf)");
  require(options.top_k >= 0, "top_k must be at least 0");
  require(options.top_p > 0.0 && options.top_p <= 1.0, "top_p must lie in (0, 1]");
  require(options.min_p >= 0.0F && options.min_p <= 1.0F, "min_p must lie in [0, 1]");
  require(penalties.repetition > 0.0F && std::isfinite(penalties.repetition),
          "repetition_penalty must be positive and finite");
  require(std::isfinite(penalties.presence) && std::isfinite(penalties.frequency),
          "presence_penalty and frequency_penalty must be finite");
  require(penalties.ids.size() == penalties.counts.size(),
          "seen_ids and seen_counts must have the same length");
  require(options.bias.ids.size() == options.bias.values.size(),
          "bias_ids and bias_values must have the same length");
  require(options.allowed.empty() || options.allowed.size() == (vocabulary + 31) / 32,
          "allowed must have a bit for each token: ceil(vocabulary / 32) words, or none");
  require(u >= 0.0 && u < 1.0, "u must lie in [0, 1)");
  require_ids(penalties.ids, vocabulary, "seen_ids");
  require_ids(options.bias.ids, vocabulary, "bias_ids");
}

nb::tuple as_tuple(const Choice& choice) {
  return nb::make_tuple(static_cast<std::int32_t>(choice.status), choice.token, choice.logprob,
                        choice.rank, choice.top_ids, choice.top_logprobs);
}

nb::tuple greedy(const Vector<float>& logits) {
  const std::span<const float> row = view(logits);
  require_row(row);
  Choice choice;
  {
    nb::gil_scoped_release unlocked;
    choice = fuserve::sampling::greedy(row);
  }
  return nb::make_tuple(static_cast<std::int32_t>(choice.status), choice.token);
}

nb::tuple sample(const Vector<float>& logits, double u, float temperature, std::int32_t top_k,
                 double top_p, float min_p, float repetition_penalty, float presence_penalty,
                 float frequency_penalty, const Vector<std::int32_t>& seen_ids,
                 const Vector<std::int32_t>& seen_counts, const Vector<std::int32_t>& bias_ids,
                 const Vector<float>& bias_values, const Vector<std::int32_t>& allowed,
                 std::int32_t num_logprobs) {
  const std::span<const float> row = view(logits);
  require_row(row);
  Options options;
  options.temperature = temperature;
  options.top_k = top_k;
  options.top_p = top_p;
  options.min_p = min_p;
  options.penalties.repetition = repetition_penalty;
  options.penalties.presence = presence_penalty;
  options.penalties.frequency = frequency_penalty;
  options.penalties.ids = view(seen_ids);
  options.penalties.counts = view(seen_counts);
  options.bias.ids = view(bias_ids);
  options.bias.values = view(bias_values);
  options.allowed = view(allowed);
  options.num_logprobs = num_logprobs;
  require_options(options, row.size(), u);
  Choice choice;
  {
    nb::gil_scoped_release unlocked;
    choice = fuserve::sampling::sample(row, options, u);
  }
  return as_tuple(choice);
}

nb::tuple score(const Vector<float>& logits, std::int32_t token, std::int32_t num_logprobs) {
  const std::span<const float> row = view(logits);
  require_row(row);
  require_ids({&token, 1}, row.size(), "token");
  Choice choice;
  {
    nb::gil_scoped_release unlocked;
    choice = fuserve::sampling::score(row, token, num_logprobs);
  }
  return as_tuple(choice);
}

}  // namespace

void bind_sampling(nb::module_& m) {
  m.def("greedy_token", &greedy, nb::arg("logits").noconvert(),
        "(status, token) of the largest logit.");
  m.def("score_token", &score, nb::arg("logits").noconvert(), nb::arg("token"),
        nb::arg("num_logprobs"),
        "(status, token, logprob, rank, top ids, top logprobs) of a given token.");
  m.def("sample_token", &sample, nb::arg("logits").noconvert(), nb::arg("u"),
        nb::arg("temperature"), nb::arg("top_k"), nb::arg("top_p"), nb::arg("min_p"),
        nb::arg("repetition_penalty"), nb::arg("presence_penalty"), nb::arg("frequency_penalty"),
        nb::arg("seen_ids").noconvert(), nb::arg("seen_counts").noconvert(),
        nb::arg("bias_ids").noconvert(), nb::arg("bias_values").noconvert(),
        nb::arg("allowed").noconvert(), nb::arg("num_logprobs"),
        "(status, token, logprob, rank, top ids, top logprobs) of one sampled token.");
}
