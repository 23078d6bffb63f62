// Defines the part lists of one instruction set, as engine_table.h does its engine.
#pragma once

#include <iterator>

#include "parts.h"

#define FASTATTN_JOIN_(a, b) a##b
#define FASTATTN_JOIN(a, b) FASTATTN_JOIN_(a, b)
#define FASTATTN_TEXT_(a) #a
#define FASTATTN_TEXT(a) FASTATTN_TEXT_(a)

namespace fastattn {

extern const PartList FASTATTN_JOIN(parts_, FASTATTN_ISA_NAMESPACE)[2];
const PartList FASTATTN_JOIN(parts_, FASTATTN_ISA_NAMESPACE)[2] = {
    {FASTATTN_TEXT(FASTATTN_ISA_NAMESPACE), "fp32",
     FASTATTN_ISA_NAMESPACE::probe_part<FASTATTN_ISA_NAMESPACE::F32>,
     FASTATTN_ISA_NAMESPACE::all_parts<FASTATTN_ISA_NAMESPACE::F32, 5>,
     std::size(FASTATTN_ISA_NAMESPACE::all_parts<FASTATTN_ISA_NAMESPACE::F32, 5>)},
#ifdef FASTATTN_BF16_DOT
    {FASTATTN_TEXT(FASTATTN_ISA_NAMESPACE), "bf16",
     FASTATTN_ISA_NAMESPACE::probe_part<FASTATTN_ISA_NAMESPACE::BF16Pair>,
     FASTATTN_ISA_NAMESPACE::all_parts<FASTATTN_ISA_NAMESPACE::BF16Pair, 3>,
     std::size(FASTATTN_ISA_NAMESPACE::all_parts<FASTATTN_ISA_NAMESPACE::BF16Pair, 3>)},
#else
    {},  // 16-bit floats are widened and run as fp32
#endif
};

}  // namespace fastattn
