// The instruction sets that the engine was built for, and the choice among them at run time.
#pragma once

#include <string>
#include <vector>

#include "engine.h"

namespace fastattn {

// The engine in use. Chosen at the first call: FASTATTN_CPU_ISA, else the best that the machine has.
const Engine& engine();

// Chooses by name. Throws std::invalid_argument for one that is unknown, not built or not on this machine.
void select_engine(const std::string& name);

// The names of those that this machine can run, the best first; the emulated one last.
std::vector<std::string> available_engines();

}  // namespace fastattn
