# Which of cuda_sources are for the device, for fp32, bf16, and weights of int8, packed and int4 (packed, too): see cpu_sources in
# the main CMakeLists.txt.
set(device "/(boxes|context|graph|plan_store|product|product_plain)\\.cu$")
# They see float32 in every dtype: bf16's table has fp32's functions.
set(float32 "/(grad_norm|sample)\\.cu$")
set(cuda_device_sources ${cuda_sources})
list(FILTER cuda_device_sources INCLUDE REGEX ${device})
set(cuda_fp32_sources ${cuda_sources})
list(FILTER cuda_fp32_sources EXCLUDE REGEX "${device}|_(bf16|quant|packed|int4)\\.cu$")
set(cuda_bf16_sources ${cuda_sources})
list(FILTER cuda_bf16_sources EXCLUDE REGEX "${device}|${float32}|_(fp32|quant|packed|int4)\\.cu$")
set(cuda_quant_sources ${cuda_sources})
list(FILTER cuda_quant_sources INCLUDE REGEX "/(linear|head|classifier|table|[a-z]+_quant)\\.cu$")
set(cuda_packed_sources ${cuda_sources})
list(FILTER cuda_packed_sources INCLUDE REGEX "/(linear|head|classifier|table|[a-z]+_packed)\\.cu$")
set(cuda_int4_sources ${cuda_sources})
list(FILTER cuda_int4_sources INCLUDE REGEX "/(linear|head|classifier|table|product_packed|weights_int4)\\.cu$")

# Files that take nvcc less time than CUDA's headers do, which it reads for the host and for each target, are
# compiled as one for each dtype. So they share no names.
set(small "adamw|blocks_packed|boxes|context|dora|dropout|embedding|grad_norm|graph|head|linear|lora|muon|peak|plan_store")
set(small "${small}|product|product_packed|product_plain|product_quant|qk_norm|rope|route|sgd|table")
set(small "/(${small}|weights|weights_quant|weights_int4)\\.cu$")
foreach(dtype device fp32 bf16 quant packed int4)
  set(sources ${cuda_${dtype}_sources})
  list(FILTER sources INCLUDE REGEX "${small}")
  list(FILTER cuda_${dtype}_sources EXCLUDE REGEX "${small}")
  list(TRANSFORM sources REPLACE "(.+)" "#include \"\\1\"\n")
  string(CONCAT includes ${sources})
  set(file ${CMAKE_CURRENT_BINARY_DIR}/small_${dtype}.cu)
  file(CONFIGURE OUTPUT ${file} CONTENT "${includes}" @ONLY)
  list(APPEND cuda_${dtype}_sources ${file})
endforeach()
