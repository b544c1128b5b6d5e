#include "instruction_sets.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace swacompile {
namespace {

#if defined(__x86_64__)

constexpr unsigned basic_leaf = 1, extended_leaf = 0x80000001;

bool has_ecx_bit(unsigned leaf, int bit) {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid(leaf, &eax, &ebx, &ecx, &edx) && (ecx >> bit & 1);
}

bool runs_v2() {
  const bool cmpxchg16b = has_ecx_bit(basic_leaf, 13), sahf = has_ecx_bit(extended_leaf, 0);
  return cmpxchg16b && sahf && __builtin_cpu_supports("sse4.2") && __builtin_cpu_supports("ssse3") &&
         __builtin_cpu_supports("popcnt");
}

// __builtin_cpu_supports also asks whether the operating system saves the wide registers; bare cpuid bits do not.
bool runs_v3() {
  const bool movbe = has_ecx_bit(basic_leaf, 22), f16c = has_ecx_bit(basic_leaf, 29);
  const bool lzcnt = has_ecx_bit(extended_leaf, 5);
  return runs_v2() && movbe && f16c && lzcnt && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
}

bool runs_v4() {
  return runs_v3() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}

bool runs_neon() { return false; }

#else

bool runs_v2() { return false; }
bool runs_v3() { return false; }
bool runs_v4() { return false; }

bool runs_neon() {
#if defined(__aarch64__)
  return true;  // a part of every ARMv8-A
#else
  return false;
#endif
}

#endif

struct InstructionSet {
  const char* name;
  bool runs;
};

// Asked once: in a virtual machine each cpuid is an exit to the hypervisor, which costs some 10 us.
const InstructionSet (&instruction_sets())[4] {
  static const InstructionSet sets[] = {
      {"x86_64_v4", runs_v4()},
      {"x86_64_v3", runs_v3()},
      {"x86_64_v2", runs_v2()},
      {"aarch64_neon", runs_neon()},
  };
  return sets;
}

}  // namespace

Support supports(const std::string& instruction_set) {
  for (const InstructionSet& set : instruction_sets()) {
    if (instruction_set == set.name) return set.runs ? Support::Yes : Support::No;
  }
  return Support::Unknown;
}

std::string supported_here() {
  std::string names;
  for (const InstructionSet& set : instruction_sets()) {
    if (set.runs) names += (names.empty() ? "" : ", ") + std::string(set.name);
  }
  return names.empty() ? "no known target" : names;
}

}  // namespace swacompile
