# The library lpd_cuda; LPD_BUILT_CUDA_ARCHITECTURES and LPD_BUILT_CUDA_COMPILER say how it was built, for build_config().
find_package(CUDAToolkit REQUIRED)  # of the nvcc found; only its static runtime is linked

set(lpd_architectures ${LPD_CUDA_ARCHITECTURES})
if(NOT lpd_architectures)
  # Tensor-core products of bf16 and asynchronous copies begin at 8.0. PTX of 90 and 120 runs on what is not listed.
  set(lpd_architectures 80-real 86-real 89-real 90)
  if(CMAKE_CUDA_COMPILER_VERSION VERSION_GREATER_EQUAL 12.8)
    list(APPEND lpd_architectures 100-real 120)
  endif()
endif()
foreach(architecture IN LISTS lpd_architectures)
  if(NOT architecture MATCHES "^([0-9]+)[a-z]?(-real)?$" OR CMAKE_MATCH_1 LESS 80)
    message(FATAL_ERROR "LPD_CUDA_ARCHITECTURES: '${architecture}' is not an architecture from 80 on, as 90 or 90-real.")
  endif()
endforeach()
string(REPLACE "-real" "" LPD_BUILT_CUDA_ARCHITECTURES "${lpd_architectures}")
string(REPLACE ";" " " LPD_BUILT_CUDA_ARCHITECTURES "${LPD_BUILT_CUDA_ARCHITECTURES}")
set(LPD_BUILT_CUDA_COMPILER "${CMAKE_CUDA_COMPILER_ID} ${CMAKE_CUDA_COMPILER_VERSION}")

add_library(lpd_cuda STATIC ${LPD_CUDA_SOURCES})
target_include_directories(lpd_cuda PUBLIC ${LPD_KERNELS})
target_compile_definitions(lpd_cuda PRIVATE LPD_CUDA_ARCHITECTURES="${LPD_BUILT_CUDA_ARCHITECTURES}")
target_compile_options(lpd_cuda PRIVATE -O3 -Xfatbin=-compress-all -Xcompiler=-Wall,-Wextra)
if(LPD_WERROR)
  # A spilled register is an error too: every kernel is meant to live in registers and shared memory.
  target_compile_options(lpd_cuda PRIVATE -Werror=all-warnings -Xptxas=--warn-on-spills,--warning-as-error)
endif()
set_target_properties(lpd_cuda PROPERTIES
  CUDA_STANDARD 17 CUDA_STANDARD_REQUIRED ON CUDA_VISIBILITY_PRESET hidden CUDA_RUNTIME_LIBRARY Static
  CUDA_ARCHITECTURES "${lpd_architectures}")
target_link_libraries(lpd_cuda PRIVATE CUDA::cudart_static lpd_cpu)
