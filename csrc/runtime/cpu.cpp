#include "runtime/cpu.h"

#include <sched.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
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

// The number that a word is, or NaN. Files of the system may hold anything, also nothing.
double number(const std::string& word) {
  char* end = nullptr;
  const double value = std::strtod(word.c_str(), &end);
  return !word.empty() && *end == '\0' && std::isfinite(value) ? value : NAN;
}

// CPUs' worth of time that `quota` in each `period` is, or infinity where that is no limit: "max",
// -1, or no numbers.
double cpus(const std::string& quota, const std::string& period) {
  const double q = number(quota);
  const double p = number(period);
  return q > 0 && p > 0 ? q / p : INFINITY;
}

// The quota of one control group, in either version's files.
double quota_in(const std::string& folder) {
  std::istringstream v2(first_line(folder + "/cpu.max"));
  std::string quota;
  std::string period;
  v2 >> quota >> period;
  return std::min(cpus(quota, period), cpus(first_line(folder + "/cpu.cfs_quota_us"),
                                            first_line(folder + "/cpu.cfs_period_us")));
}

// Whether a line of /proc/self/cgroup is of version 2 (which names no controllers) or of version
// 1's controller of CPU time, and not of cpuset or cpuacct.
bool limits_cpu_time(const std::string& controllers) {
  return controllers.empty() || ("," + controllers + ",").find(",cpu,") != std::string::npos;
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

double cgroup_quota(const std::string& root) {
  const std::string mount = root + "/sys/fs/cgroup";
  // Version 2, version 1, and version 2 beside version 1.
  const std::string hierarchies[] = {mount, mount + "/cpu", mount + "/unified"};
  double quota = INFINITY;
  // In a container the mounted root often is the container's own group.
  for (const std::string& hierarchy : hierarchies) quota = std::min(quota, quota_in(hierarchy));
  std::ifstream groups(root + "/proc/self/cgroup");
  for (std::string line; std::getline(groups, line);) {
    const size_t first = line.find(':');
    const size_t second = first == std::string::npos ? first : line.find(':', first + 1);
    if (second == std::string::npos) continue;
    if (!limits_cpu_time(line.substr(first + 1, second - first - 1))) continue;
    std::string path = line.substr(second + 1);
    while (path.size() > 1 && path.front() == '/') {
      for (const std::string& hierarchy : hierarchies)
        quota = std::min(quota, quota_in(hierarchy + path));
      path.resize(path.find_last_of('/'));
    }
  }
  return quota;
}

int usable_threads(const std::string& root) {
  cpu_set_t set;
  CPU_ZERO(&set);
  if (sched_getaffinity(0, sizeof set, &set) != 0) return 1;
  // Hyper-threads of one core share its arithmetic units: count each sibling list once.
  std::set<std::string> cores;
  for (int cpu = 0; cpu < CPU_SETSIZE; ++cpu) {
    if (!CPU_ISSET(static_cast<size_t>(cpu), &set)) continue;
    const std::string name = "cpu" + std::to_string(cpu);
    const std::string siblings =
        first_line(root + "/sys/devices/system/cpu/" + name + "/topology/thread_siblings_list");
    cores.insert(siblings.empty() ? name : siblings);
  }
  const double quota = std::ceil(cgroup_quota(root));
  const double threads = std::min(static_cast<double>(cores.size()), quota);
  return std::max(1, static_cast<int>(threads));
}

}  // namespace fuserve
