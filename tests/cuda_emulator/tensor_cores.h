#pragma once
// Asynchronous copies to shared memory, and matrix instructions of a warp: what a kernel reaches by
// inline PTX on a GPU, so its thin wrappers call these instead where the emulator compiles them.
#include "emulator.h"

namespace cuda_emulator {

// cp.async.cg: 4, 8 or 16 bytes to shared memory, of which those beyond `source_bytes` become 0;
// where that is 0, `global` may be any address.
void copy_async(void* shared, const void* global, int bytes, int source_bytes, Site site = here());
// cp.async.commit_group
void commit_copies();
// cp.async.wait_group: at most `pending` of the newest groups are still on their way after it.
void wait_for_copies(int pending);

enum class Format { BFloat16, Half };

// mma.sync.aligned.m16n8k16.row.col.f32: d = a * b + c; the fragments of one lane.
void multiply_accumulate(Format format, float (&d)[4], const uint32_t (&a)[4],
                         const uint32_t (&b)[2], const float (&c)[4], Site site = here());

// ldmatrix.sync.aligned.m8n8.x1, .x2 or .x4, as `count` says; `row` as in PTX: lane 8 i + j gives
// the address of row j of matrix i.
void load_matrices(uint32_t* registers, int count, const void* row, bool transposed,
                   Site site = here());

}  // namespace cuda_emulator
