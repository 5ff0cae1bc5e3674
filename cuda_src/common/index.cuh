// The type of offsets and counts inside one image.
#pragma once
#include "common/config.cuh"

namespace msda {

using index_t = select<config::wide_index, long long, int>;

}  // namespace msda
