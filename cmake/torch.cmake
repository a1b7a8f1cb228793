# secateur::torch is the torch that the build's Python imports. find_package(Torch) is not used:
# with a CUDA wheel it aborts where no CUDA toolkit is installed.
execute_process(
  COMMAND "${Python_EXECUTABLE}" -c
    "import os, torch; print(os.path.dirname(torch.__file__), torch.__version__, sep=';')"
  OUTPUT_VARIABLE _torch OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
list(GET _torch 0 TORCH_ROOT)
list(GET _torch 1 TORCH_VERSION)
message(STATUS "torch ${TORCH_VERSION} at ${TORCH_ROOT}")

add_library(secateur_torch INTERFACE)
add_library(secateur::torch ALIAS secateur_torch)
target_include_directories(secateur_torch SYSTEM INTERFACE "${TORCH_ROOT}/include")
target_link_directories(secateur_torch INTERFACE "${TORCH_ROOT}/lib")
target_link_libraries(secateur_torch INTERFACE torch_cpu c10)
# LibTorch stable ABI: one binary runs on every torch >= 2.10.
target_compile_definitions(secateur_torch INTERFACE
  TORCH_STABLE_ONLY TORCH_TARGET_VERSION=0x020a000000000000)
