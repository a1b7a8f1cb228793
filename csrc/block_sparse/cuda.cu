#include "block_sparse/block_sparse.h"
#include "block_sparse/simt.cuh"

// tensor_cores.cuh (bool takes(const Problem&), workspace_bytes and run as here, in namespace
// tensor_cores) goes in front of simt where it takes a problem.
namespace secateur::block_sparse::CUDA {

int64_t workspace_bytes(const Problem& problem) { return simt::workspace_bytes(problem); }

int run(const Problem& problem, void* workspace, void* stream) {
  return simt::run(problem, workspace, stream);
}

}  // namespace secateur::block_sparse::CUDA
