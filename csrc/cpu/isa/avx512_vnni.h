// AVX-512 with the dot product of AVX-512 VNNI.
#pragma once

#define INT8KV_AVX512_VNNI
#include "cpu/isa/avx512.h"
