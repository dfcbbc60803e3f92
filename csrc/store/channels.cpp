// Chooses the loops on channels of the instruction set in use.
#include "store/channels.h"

#include <string_view>

namespace int8kv::cpu {

#define DECLARE_ISA(isa)                   \
  namespace isa {                          \
  const ChannelKernels& channel_kernels(); \
  }
INT8KV_FOR_EACH_ISA(DECLARE_ISA)
#undef DECLARE_ISA

const ChannelKernels& channel_kernels() {
  const std::string_view name = current_isa();
#define RETURN_ISA(isa) \
  if (name == #isa) return isa::channel_kernels();
  INT8KV_FOR_EACH_ISA(RETURN_ISA)
#undef RETURN_ISA
  return scalar::channel_kernels();
}

}  // namespace int8kv::cpu
