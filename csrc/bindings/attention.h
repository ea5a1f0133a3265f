// The KV cache as Python holds it.
#pragma once

#include "attention/attention_types.h"
#include "bindings/bindings.h"
#include "runtime/buffer.h"

namespace fuserve::bindings {

struct CacheHandle {
  Buffer memory;
  KVCache cache;
};

}  // namespace fuserve::bindings
