// Defines the table of one instruction set. Included by engine_<isa>.cpp after its vector types, with
// FASTATTN_ISA_NAMESPACE naming both the namespace and the instruction set.
#pragma once

#include "additive_run.h"
#include "backward_run.h"
#include "engine.h"
#include "forward_run.h"
#include "probe.h"
#include "weights.h"

#define FASTATTN_JOIN_(a, b) a##b
#define FASTATTN_JOIN(a, b) FASTATTN_JOIN_(a, b)
#define FASTATTN_TEXT_(a) #a
#define FASTATTN_TEXT(a) FASTATTN_TEXT_(a)

namespace fastattn {

const Engine FASTATTN_JOIN(engine_, FASTATTN_ISA_NAMESPACE) = {
    FASTATTN_TEXT(FASTATTN_ISA_NAMESPACE),
    FASTATTN_ISA_NAMESPACE::forward,
    FASTATTN_ISA_NAMESPACE::backward,
    FASTATTN_ISA_NAMESPACE::weights,
    FASTATTN_ISA_NAMESPACE::additive_exponentials,
    FASTATTN_ISA_NAMESPACE::additive_forward,
    FASTATTN_ISA_NAMESPACE::additive_backward,
    FASTATTN_ISA_NAMESPACE::probe_multiply_add,
    FASTATTN_ISA_NAMESPACE::probe_read,
};

}  // namespace fastattn
