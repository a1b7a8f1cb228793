# secateur_add_op(<name> [contract]) adds the files of csrc/<name>/:
#   op.cpp   schema, checks, CPU registration
#   cpu.cpp  CPU kernels; compiled once per instruction set, so it may include no torch header
#            (an inline function compiled for AVX-512 here could replace the baseline copy at
#            link time) and define no static data
#   op_cuda.cpp, cuda.cu   the same on CUDA, where the op has them; cuda.cu includes no torch header
#            either (nvcc takes minutes over them)
# <contract> is the compiler's -ffp-contract (nvcc's -fmad): "off" (the default) where every device
# and instruction set must round alike, "fast" where a fused multiply-add is welcome.
set(SECATEUR_ISAS BASE)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64" AND NOT MSVC)
  list(APPEND SECATEUR_ISAS AVX2 AVX512 AVX512_BF16)
  # prefetchw is no operation where a CPU lacks it.
  set(SECATEUR_FLAGS_AVX2 -mavx2 -mfma -mf16c -mprfchw)
  set(SECATEUR_FLAGS_AVX512
      ${SECATEUR_FLAGS_AVX2} -mavx512f -mavx512bw -mavx512vl -mavx512dq -mprefer-vector-width=512)
  set(SECATEUR_FLAGS_AVX512_BF16 ${SECATEUR_FLAGS_AVX512} -mavx512bf16)
endif()

function(secateur_add_op name)
  set(contract off)
  if(ARGC GREATER 1)
    set(contract ${ARGV1})
  endif()
  set(dir ${CMAKE_CURRENT_SOURCE_DIR}/csrc/${name})
  target_sources(_C PRIVATE ${dir}/op.cpp)
  foreach(isa IN LISTS SECATEUR_ISAS)
    set(copy ${CMAKE_CURRENT_BINARY_DIR}/isa/${name}.${isa}.cpp)
    file(CONFIGURE OUTPUT ${copy} CONTENT "#include \"${dir}/cpu.cpp\"\n")
    set_source_files_properties(${copy} PROPERTIES
      COMPILE_OPTIONS "${SECATEUR_FLAGS_${isa}};-O3;-ffp-contract=${contract}"
      COMPILE_DEFINITIONS SECATEUR_ISA=${isa}
      OBJECT_DEPENDS ${dir}/cpu.cpp)
    target_sources(_C PRIVATE ${copy})
  endforeach()
  if(TARGET secateur_cuda AND EXISTS ${dir}/cuda.cu)
    target_sources(secateur_cuda PRIVATE ${dir}/op_cuda.cpp ${dir}/cuda.cu)
    if(contract STREQUAL "off")
      set_source_files_properties(${dir}/cuda.cu PROPERTIES COMPILE_OPTIONS -fmad=false)
    endif()
  endif()
endfunction()
