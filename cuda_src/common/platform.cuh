// What differs between a GPU and a CPU that runs this text in a test (-DMSDA_PTX=0, with functions that stand in for CUDA's).
#pragma once

// A header's constants are not all used by each kernel that includes it.
#pragma nv_diag_suppress 177

// Every piece of inline PTX stands under `#if MSDA_PTX`, with portable code in the other branch.
#ifndef MSDA_PTX
#define MSDA_PTX 1
#define MSDA_SHARED_MEMORY(name) extern __shared__ uint4 name[]
#endif
