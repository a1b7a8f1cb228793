#include "block_sparse/block_sparse.h"
#include "block_sparse/simt.cuh"
#include "block_sparse/tensor_cores.cuh"

namespace secateur::block_sparse::CUDA {

int64_t workspace_bytes(const Problem& problem) {
  return tensor_cores::takes(problem) ? tensor_cores::workspace_bytes(problem)
                                      : simt::workspace_bytes(problem);
}

int run(const Problem& problem, void* workspace, void* stream) {
  return tensor_cores::takes(problem) ? tensor_cores::run(problem, workspace, stream)
                                      : simt::run(problem, workspace, stream);
}

}  // namespace secateur::block_sparse::CUDA
