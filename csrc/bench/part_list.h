// What the micro-benchmark of one instruction set offers to the program that times it.
#pragma once

namespace fastattn {

// One part: its name, and a function that runs it once over all blocks and returns the useful FLOPs (for the
// softmax: 2 per score, so that its fraction is one multiply-add per score).
struct Part {
  const char* name;
  double (*run)();
};

struct PartList {
  const char* isa;
  const char* dtype;
  double (*probe)();  // FLOPs of multiply-adds on registers
  const Part* parts;
  int count;
};

}  // namespace fastattn
