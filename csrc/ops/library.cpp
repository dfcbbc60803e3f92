// The library as PyTorch loads it: what is installed and which CPU kernels run. Only the files of
// this folder include Torch, and only its stable ABI, so that one build serves PyTorch 2.11 and
// later.
#include <torch/csrc/stable/library.h>

#include <string>

#include "cpu/kernels.h"
#include "ops/checks.h"

namespace {

using namespace int8kv;  // NOLINT: this file is the library's border

std::string cpu_isas() { return cpu::available_isas(); }
std::string cpu_isa() { return cpu::current_isa(); }

void set_cpu_isa(std::string isa) {
  INT8KV_CHECK(cpu::set_isa(isa.c_str()), "isa '", isa,
               "' is not available on this CPU; available: ", cpu::available_isas());
}

bool has_cuda_kernels() {
#if defined(INT8KV_WITH_CUDA)
  return true;
#else
  return false;
#endif
}

}  // namespace

STABLE_TORCH_LIBRARY(int8kv, m) {
  m.def("cpu_isas() -> str");
  m.def("cpu_isa() -> str");
  m.def("set_cpu_isa(str isa) -> ()");
  m.def("has_cuda_kernels() -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(int8kv, CompositeExplicitAutograd, m) {
  m.impl("cpu_isas", TORCH_BOX(&cpu_isas));
  m.impl("cpu_isa", TORCH_BOX(&cpu_isa));
  m.impl("set_cpu_isa", TORCH_BOX(&set_cpu_isa));
  m.impl("has_cuda_kernels", TORCH_BOX(&has_cuda_kernels));
}
