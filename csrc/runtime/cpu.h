// What this machine offers: instruction sets and the number of threads worth using.
#pragma once

#include <string>
#include <vector>

namespace fuserve {

// Instruction sets compiled in and supported here, the best last.
std::vector<std::string> available_isas();

// CPUs' worth of time that the control groups of this process leave it: the tightest limit on the
// way from its group to the root, in version 1 or 2; infinity without one. The system's files are
// looked for under `root`, so that tests can lay out their own.
double cgroup_quota(const std::string& root = "");

// Threads worth using: one for each physical core in the affinity mask, and no more than the
// cgroup's CPU quota (rounded up). At least 1.
int usable_threads(const std::string& root = "");

}  // namespace fuserve
