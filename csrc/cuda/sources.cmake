# Which of cuda_sources are for the device, for fp32, bf16 and quantized weights: see cpu_sources in
# the main CMakeLists.txt.
set(device "/(boxes|context|graph|plan_store|product|product_plain)\\.cu$")
# They see float32 in every dtype: bf16's table has fp32's functions.
set(float32 "/(grad_norm|sample)\\.cu$")
set(cuda_device_sources ${cuda_sources})
list(FILTER cuda_device_sources INCLUDE REGEX ${device})
set(cuda_fp32_sources ${cuda_sources})
list(FILTER cuda_fp32_sources EXCLUDE REGEX "${device}|_(bf16|quant)\\.cu$")
set(cuda_bf16_sources ${cuda_sources})
list(FILTER cuda_bf16_sources EXCLUDE REGEX "${device}|${float32}|_(fp32|quant)\\.cu$")
set(cuda_quant_sources ${cuda_sources})
list(FILTER cuda_quant_sources INCLUDE REGEX "/(linear|head|classifier|table|[a-z]+_quant)\\.cu$")
