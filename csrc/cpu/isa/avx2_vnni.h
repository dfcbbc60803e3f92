// AVX2 with the dot product of AVX-VNNI, for CPUs without AVX-512 (Alder Lake and later clients).
#pragma once

#define INT8KV_AVX2_VNNI
#include "cpu/isa/avx2.h"
