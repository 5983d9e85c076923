# The CUDA backend, where nvcc and cuBLAS's headers are: the library itself is found at run time.

include(CheckLanguage)
check_language(CUDA)
set(missing "")
if(NOT CMAKE_CUDA_COMPILER)
  set(missing "nvcc")
else()
  set(python_packages "")
  if(Python_EXECUTABLE)
    execute_process(COMMAND ${Python_EXECUTABLE} -c "import sysconfig; print(sysconfig.get_path('purelib'))"
      OUTPUT_VARIABLE python_packages OUTPUT_STRIP_TRAILING_WHITESPACE)
  endif()
  get_filename_component(cuda_bin ${CMAKE_CUDA_COMPILER} REALPATH)
  get_filename_component(cuda_bin ${cuda_bin} DIRECTORY)
  file(GLOB wheel_includes ${python_packages}/nvidia/*/include)
  find_path(GPTC_CUBLAS_INCLUDE cublasLt.h PATHS ${cuda_bin}/../include
    ${cuda_bin}/../targets/x86_64-linux/include ${wheel_includes} /usr/local/cuda/include)
  if(NOT GPTC_CUBLAS_INCLUDE)
    set(missing "cublasLt.h (pip install nvidia-cublas brings it)")
  endif()
endif()
if(missing)
  if(GPTC_CUDA STREQUAL "ON")
    message(FATAL_ERROR "GPTC_CUDA is ON, but ${missing} was not found")
  endif()
  message(STATUS "Built without CUDA: ${missing} was not found")
  return()
endif()

# This machine's GPU, where there is one; else every kind that the kernels know, and PTX for later.
# 86 has 80's PTX: compiled from its own, the machine code is the same and takes longer. 89 runs 86's:
# compiled for it, the machine code is the same too.
set(cuda_targets "")
if(NOT CMAKE_CUDA_ARCHITECTURES)
  execute_process(COMMAND nvidia-smi --query-gpu=compute_cap --format=csv,noheader
    OUTPUT_VARIABLE capability ERROR_QUIET RESULT_VARIABLE no_gpu)
  if(no_gpu OR NOT capability)
    set(CMAKE_CUDA_ARCHITECTURES OFF)
    set(cuda_targets
      "--generate-code=arch=compute_80,code=[sm_80,sm_86]"
      "--generate-code=arch=compute_90a,code=[sm_90a]"
      "--generate-code=arch=compute_100,code=[sm_100,compute_100]")
  elseif(capability MATCHES "^9\\.0")
    # `native` would be 90, which has no instructions for a warpgroup.
    set(CMAKE_CUDA_ARCHITECTURES 90a-real)
  else()
    set(CMAKE_CUDA_ARCHITECTURES native)
  endif()
endif()
enable_language(CUDA)
find_package(CUDAToolkit REQUIRED)

# A suffix says for which dtype a file is, as in cpu/; without one it is for fp32 and bf16. Some are
# for the device.
file(GLOB cuda_sources CONFIGURE_DEPENDS csrc/cuda/*.cu)
include(csrc/cuda/sources.cmake)

function(add_cuda name)
  add_library(${name} OBJECT ${ARGN})
  target_include_directories(${name} PRIVATE csrc/cuda csrc)
  # After nvcc's own: a folder of wheels may hold headers of another version of CUDA's runtime.
  target_include_directories(${name} SYSTEM PRIVATE ${GPTC_CUBLAS_INCLUDE})
  # Said to CMake too, which else adds an older one to the option.
  target_compile_options(${name} PRIVATE -std=c++20 -Xcompiler=-Wall,-Wextra ${cuda_targets})
  if(GPTC_PTXAS_INFO)
    target_compile_options(${name} PRIVATE -Xptxas=-v)
  endif()
  set_target_properties(${name} PROPERTIES CUDA_STANDARD 20 CUDA_VISIBILITY_PRESET hidden)
  target_sources(gpt_objects INTERFACE $<TARGET_OBJECTS:${name}>)
endfunction()

# The compiler's longest files begin first, so that no core waits for the last one.
add_cuda(cuda_bf16 ${cuda_bf16_sources})
target_compile_definitions(cuda_bf16 PRIVATE CUDA_DTYPE=bf16 CUDA_BF16)
add_cuda(cuda_fp32 ${cuda_fp32_sources})
target_compile_definitions(cuda_fp32 PRIVATE CUDA_DTYPE=fp32 CUDA_FP32)
add_cuda(cuda_device ${cuda_device_sources})

add_cuda(cuda_int8 ${cuda_quant_sources})
target_compile_definitions(cuda_int8 PRIVATE CUDA_DTYPE=int8 CUDA_BF16 CUDA_QUANT)
add_cuda(cuda_packed ${cuda_packed_sources})
target_compile_definitions(cuda_packed PRIVATE CUDA_DTYPE=packed CUDA_BF16 CUDA_QUANT CUDA_PACKED)

add_cuda(cuda_int4 ${cuda_int4_sources})
target_compile_definitions(cuda_int4 PRIVATE CUDA_DTYPE=int4 CUDA_BF16 CUDA_QUANT CUDA_PACKED
  CUDA_ROUNDS)
target_compile_definitions(gpt_objects PRIVATE GPTC_HAS_CUDA)
target_link_libraries(gpt_objects PUBLIC CUDA::cudart_static ${CMAKE_DL_LIBS} rt)
set(GPTC_HAS_CUDA TRUE)
