# SECATEUR_CUDA=AUTO builds the CUDA kernels where an nvcc is found that works, ON insists on them,
# OFF does not look. They are a library of their own, secateur_cuda: plain, on the stable ABI, with a
# static CUDA runtime, so the torch it is built against needs no CUDA, and Python loads it only under
# a torch that has (python/secateur/ops/_cuda.py).
set(SECATEUR_CUDA AUTO CACHE STRING "Build the CUDA kernels: AUTO, ON or OFF")
if(NOT SECATEUR_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "expected SECATEUR_CUDA to be AUTO, ON or OFF, got '${SECATEUR_CUDA}'")
endif()
set(SECATEUR_CUDA_BUILD none)
if(SECATEUR_CUDA STREQUAL "OFF")
  return()
endif()

include(CheckLanguage)
check_language(CUDA)
set(_nvcc none)
if(CMAKE_CUDA_COMPILER)
  execute_process(COMMAND ${CMAKE_CUDA_COMPILER} --version OUTPUT_VARIABLE _nvcc)
endif()
if(NOT _nvcc MATCHES "release ([0-9.]+)" OR CMAKE_MATCH_1 VERSION_LESS 12.0)  # C++20, sm_90a
  if(SECATEUR_CUDA STREQUAL "ON")
    message(FATAL_ERROR "expected nvcc 12.0 or newer for SECATEUR_CUDA=ON, got: ${_nvcc}")
  endif()
  message(STATUS "no nvcc 12.0 or newer: building without CUDA kernels")
  return()
endif()

# Machine code for A100 and H100, PTX for everything else from A100 on, unless others are asked for:
# the PTX of an "a" architecture would run nowhere else.
if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES 80-real 90a-real 80-virtual)
endif()
set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
enable_language(CUDA)
find_package(CUDAToolkit REQUIRED)
string(REGEX REPLACE "([0-9a-z]+)-real" "sm_\\1" _targets "${CMAKE_CUDA_ARCHITECTURES}")
string(REGEX REPLACE "([0-9a-z]+)-virtual" "compute_\\1" _targets "${_targets}")
list(JOIN _targets ", " _targets)
set(SECATEUR_CUDA_BUILD "nvcc ${CMAKE_CUDA_COMPILER_VERSION} for ${_targets}")

add_library(secateur_cuda MODULE)
target_include_directories(secateur_cuda PRIVATE csrc)
# The standard is an option: CMake 3.25 does not know that nvcc 13 has it, and leaves it out.
target_compile_options(secateur_cuda PRIVATE
  $<$<COMPILE_LANGUAGE:CXX>:-Wall;-Wextra;-Wno-psabi>
  $<$<COMPILE_LANGUAGE:CUDA>:-std=c++20;--expt-relaxed-constexpr>)
target_link_libraries(secateur_cuda PRIVATE secateur::torch torch CUDA::cudart_static)
# libtorch.so brings in the CUDA half of a torch that has one: the linker would leave it out, since
# the torch here may define nothing that is needed.
target_link_options(secateur_cuda PRIVATE -Wl,--no-as-needed -Wl,--exclude-libs,ALL)
install(TARGETS secateur_cuda LIBRARY DESTINATION secateur)
