// Chooses the loops on channels of the instruction set in use.
#include "store/channels.h"

namespace int8kv::cpu {

INT8KV_DISPATCH(ChannelKernels, channel_kernels)

}  // namespace int8kv::cpu
