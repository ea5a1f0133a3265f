#include "bindings/bindings.h"

NB_MODULE(_native, m) {
  // What a server's threads hold until the process ends would be listed at its exit as leaked.
  nanobind::set_leak_warnings(false);
  m.doc() = "fuserve's native core. Use it through fuserve.kernels and fuserve.decoder.";
  bind_machine(m);
  bind_linear(m);
  bind_attention(m);
  bind_conv(m);
  bind_exchange(m);
  bind_decoder(m);
  bind_image(m);
  bind_sampling(m);
}
