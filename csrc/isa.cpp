#include "isa.h"

#include <cstdlib>
#include <stdexcept>

namespace fastattn {
namespace {

struct Candidate {
  const Engine* engine;
  bool runs_here;
  bool automatic;  // may be chosen without being asked for
};

bool has_avx2() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#else
  return false;
#endif
}
bool has_avx512() {
#if defined(__x86_64__)
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#else
  return false;
#endif
}
[[maybe_unused]] bool has_avx512_bf16() {
#if defined(FASTATTN_WITH_AVX512_BF16)
  return has_avx512() && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

// Best first.
const std::vector<Candidate>& candidates() {
  static const std::vector<Candidate> list = {
#ifdef FASTATTN_WITH_AVX512_BF16
      {&engine_avx512_bf16, has_avx512_bf16(), true},
#endif
#ifdef FASTATTN_WITH_AVX512
      {&engine_avx512, has_avx512(), true},
#endif
#ifdef FASTATTN_WITH_AVX2
      {&engine_avx2, has_avx2(), true},
#endif
      {&engine_portable, true, true},
#ifdef FASTATTN_WITH_AVX512_BF16_EMULATED
      {&engine_avx512_bf16_emulated, has_avx512(), false},
#endif
  };
  return list;
}

const Engine& find(const std::string& name, const char* argument) {
  std::string names;
  for (const Candidate& candidate : candidates()) {
    if (name == candidate.engine->name) {
      if (candidate.runs_here) return *candidate.engine;
      throw std::invalid_argument(std::string(argument) + "='" + name +
                                  "' names an instruction set that this machine does not have");
    }
    if (candidate.runs_here) names += std::string(names.empty() ? "" : ", ") + candidate.engine->name;
  }
  throw std::invalid_argument(std::string(argument) + " must be one of " + names + " on this machine, got '" +
                              name + "'");
}

const Engine& choose() {
  const char* asked = std::getenv("FASTATTN_CPU_ISA");
  if (asked && *asked) return find(asked, "FASTATTN_CPU_ISA");
  for (const Candidate& candidate : candidates())
    if (candidate.automatic && candidate.runs_here) return *candidate.engine;
  return engine_portable;
}

const Engine* selected = nullptr;

}  // namespace

const Engine& engine() {
  if (!selected) selected = &choose();
  return *selected;
}

void select_engine(const std::string& name) { selected = &find(name, "isa"); }

std::vector<std::string> available_engines() {
  std::vector<std::string> names;
  for (const Candidate& candidate : candidates())
    if (candidate.runs_here) names.push_back(candidate.engine->name);
  return names;
}

}  // namespace fastattn
