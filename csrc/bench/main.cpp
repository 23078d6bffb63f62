// Prints, for every instruction set of this machine, the fraction of the multiply-add rate that each part of
// the kernels reaches alone. The rate is measured beside each sample: clocks drift.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <vector>

#include "../isa.h"
#include "part_list.h"

namespace fastattn {

extern const PartList parts_portable[2], parts_avx2[2], parts_avx512[2], parts_avx512_bf16[2];

namespace {

template <class Function>
double rate(Function run, double least_seconds) {
  using clock = std::chrono::steady_clock;
  const auto start = clock::now();
  double operations = 0, seconds = 0;
  do {
    operations += run();
    seconds = std::chrono::duration<double>(clock::now() - start).count();
  } while (seconds < least_seconds);
  return operations / seconds;
}

void report(const PartList& list) {
  if (!list.parts) return;
  std::printf("%s %s: %.1f GFLOP/s of multiply-adds\n", list.isa, list.dtype, rate(list.probe, 0.02) / 1e9);
  for (int i = 0; i < list.count; i++) {
    // A sample between two probes below the best one says more about the neighbours than about the kernel.
    struct Sample {
      double part, before, after;
    };
    std::vector<Sample> samples;
    double best = 0;
    for (int count = 0; count < 400; count++) {
      const double before = rate(list.probe, 0), part = rate(list.parts[i].run, 0.0003),
                   after = rate(list.probe, 0);
      samples.push_back({part, before, after});
      best = std::max({best, before, after});
    }
    std::vector<double> fraction;
    for (const Sample& s : samples)
      if (std::min(s.before, s.after) > 0.97 * best) fraction.push_back(s.part / std::max(s.before, s.after));
    std::sort(fraction.begin(), fraction.end());
    if (fraction.empty())
      std::printf("  %-30s  the machine is too busy\n", list.parts[i].name);
    else
      std::printf("  %-30s  %.3f  (%zu of %zu samples)\n", list.parts[i].name, fraction[fraction.size() / 2],
                  fraction.size(), samples.size());
  }
}

}  // namespace
}  // namespace fastattn

int main() {
  using namespace fastattn;
  std::puts("Fraction of the multiply-add rate, one thread (softmax: one multiply-add per score counts)");
  for (const std::string& isa : available_engines()) {
    if (isa == "portable")
      for (const PartList& list : parts_portable) report(list);
#ifdef FASTATTN_WITH_AVX2
    if (isa == "avx2")
      for (const PartList& list : parts_avx2) report(list);
#endif
#ifdef FASTATTN_WITH_AVX512
    if (isa == "avx512")
      for (const PartList& list : parts_avx512) report(list);
#endif
#ifdef FASTATTN_WITH_AVX512_BF16
    if (isa == "avx512_bf16")
      for (const PartList& list : parts_avx512_bf16) report(list);
#endif
  }
}
