#include "runtime/cpu.h"

#include <sched.h>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <set>
#include <sstream>

namespace fuserve {
namespace {

std::string first_line(const std::string& path) {
  std::ifstream file(path);
  std::string line;
  std::getline(file, line);
  return line;
}

// CPUs' worth of time in one cgroup directory, or infinity.
double quota_in(const std::string& folder) {
  std::istringstream v2(first_line(folder + "/cpu.max"));
  std::string limit;
  double period = 0;
  if (v2 >> limit >> period && limit != "max" && period > 0) return std::stod(limit) / period;
  std::istringstream v1(first_line(folder + "/cpu.cfs_quota_us"));
  std::istringstream v1_period(first_line(folder + "/cpu.cfs_period_us"));
  double quota = 0;
  if (v1 >> quota && v1_period >> period && quota > 0 && period > 0) return quota / period;
  return INFINITY;
}

// The tightest quota on the path from this process's cgroup to the root.
double cgroup_quota() {
  double quota = std::min(quota_in("/sys/fs/cgroup"), quota_in("/sys/fs/cgroup/cpu"));
  std::ifstream groups("/proc/self/cgroup");
  for (std::string line; std::getline(groups, line);) {
    const size_t first = line.find(':');
    const size_t second = line.find(':', first + 1);
    if (first == std::string::npos || second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    if (!controllers.empty() && controllers.find("cpu") == std::string::npos) continue;
    const std::string root = controllers.empty() ? "/sys/fs/cgroup" : "/sys/fs/cgroup/cpu";
    for (std::string path = line.substr(second + 1); path.size() > 1;
         path.resize(path.find_last_of('/')))
      quota = std::min(quota, quota_in(root + path));
  }
  return quota;
}

}  // namespace

std::vector<std::string> available_isas() {
  std::vector<std::string> isas{"scalar"};
#if defined(FUSERVE_HAVE_avx2)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) isas.emplace_back("avx2");
#endif
#if defined(FUSERVE_HAVE_avx512)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vnni"))
    isas.emplace_back("avx512");
#endif
  return isas;
}

int usable_threads() {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof set, &set) != 0) return 1;
  // Hyper-threads of one core share its arithmetic units: count each sibling list once.
  std::set<std::string> cores;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (!CPU_ISSET(static_cast<size_t>(cpu), &set)) continue;
    const std::string name = std::to_string(cpu);
    const std::string siblings =
        first_line("/sys/devices/system/cpu/cpu" + name + "/topology/thread_siblings_list");
    cores.insert(siblings.empty() ? "cpu" + name : siblings);
  }
  const double quota = std::ceil(cgroup_quota());
  const double threads = std::min(static_cast<double>(cores.size()), quota);
  return std::max(1, static_cast<int>(threads));
}

}  // namespace fuserve
