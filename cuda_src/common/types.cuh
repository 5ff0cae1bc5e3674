// The types that the configuration chooses.
#pragma once
#include "common/config.cuh"

namespace msda {

using value_t = config::value_t;
using acc_t = select<is_same<value_t, double>::value, double, float>;   // of all arithmetic and all sums

}  // namespace msda
