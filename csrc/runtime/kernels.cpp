#include "runtime/kernels.h"

#include <algorithm>
#include <stdexcept>

#include "runtime/cpu.h"

namespace fuserve {

namespace scalar {
const Kernels& kernel_table();
}
namespace avx2 {
const Kernels& kernel_table();
}
namespace avx512 {
const Kernels& kernel_table();
}

const Kernels& kernels(const std::string& isa) {
  const std::vector<std::string> available = available_isas();
  const std::string& chosen = isa.empty() ? available.back() : isa;
  if (std::find(available.begin(), available.end(), chosen) == available.end()) {
    std::string names;
    for (const std::string& name : available) names += (names.empty() ? "" : ", ") + name;
    throw std::invalid_argument("instruction set '" + chosen +
                                "' is not available on this machine; available: " + names);
  }
#if defined(FUSERVE_HAVE_avx512)
  if (chosen == "avx512") return avx512::kernel_table();
#endif
#if defined(FUSERVE_HAVE_avx2)
  if (chosen == "avx2") return avx2::kernel_table();
#endif
  return scalar::kernel_table();
}

}  // namespace fuserve
