// What this machine offers: instruction sets and the number of threads worth using.
#pragma once

#include <string>
#include <vector>

namespace fuserve {

// Instruction sets compiled in and supported here, the best last.
std::vector<std::string> available_isas();

// Threads worth using: one for each physical core in the affinity mask, and no more than the
// cgroup's CPU quota (rounded up). At least 1.
int usable_threads();

}  // namespace fuserve
