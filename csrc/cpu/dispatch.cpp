// Chooses the instruction set at run time. Only this file asks the CPU what it has.
#include <atomic>
#include <cstring>
#include <string>

#include "cpu/kernels.h"

namespace int8kv::cpu {

#define DECLARE_ISA(isa)                   \
  namespace isa {                          \
  const Kernels& kernels_for(CacheFormat); \
  }
INT8KV_FOR_EACH_ISA(DECLARE_ISA)
#undef DECLARE_ISA

namespace {

struct Path {
  const char* name;
  bool available;
  const Kernels& (*kernels_for)(CacheFormat);
};

bool has_scalar() { return true; }
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
#if defined(INT8KV_EMULATED_ISAS)
bool has_avx2_vnni() { return has_avx2(); }
bool has_avx512() { return has_avx2(); }
bool has_avx512_vnni() { return has_avx512(); }
#else
bool has_avx2_vnni() { return has_avx2() && __builtin_cpu_supports("avxvnni"); }
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_avx512_vnni() { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }
#endif

const Path* paths() {
#define PATH_OF_ISA(isa) Path{#isa, has_##isa(), &isa::kernels_for},
  static const Path table[] = {INT8KV_FOR_EACH_ISA(PATH_OF_ISA) Path{}};
#undef PATH_OF_ISA
  return table;
}

const Path* fastest() {
  const Path* best = nullptr;
  for (const Path* path = paths(); path->name; ++path) {
    if (path->available) best = path;
  }
  return best;
}

// Null if this CPU has no such path, or there is none of that name.
const Path* find(const char* name) {
  for (const Path* path = paths(); path->name; ++path) {
    if (path->available && std::strcmp(path->name, name) == 0) return path;
  }
  return nullptr;
}

std::atomic<const Path*>& chosen() {
  static std::atomic<const Path*> path{fastest()};
  return path;
}

}  // namespace

bool has_isa(const char* name) { return find(name) != nullptr; }

const Kernels& kernels_for(CacheFormat format, const char* isa) {
  const Path* path = isa == nullptr ? nullptr : find(isa);
  if (path == nullptr) path = chosen().load(std::memory_order_relaxed);
  return path->kernels_for(format);
}

const char* current_isa() { return chosen().load(std::memory_order_relaxed)->name; }

const char* available_isas() {
  static const std::string names = [] {
    std::string list;
    for (const Path* path = paths(); path->name; ++path) {
      if (path->available) list += list.empty() ? path->name : std::string(",") + path->name;
    }
    return list;
  }();
  return names.c_str();
}

bool set_isa(const char* name) {
  const Path* path = find(name);
  if (path != nullptr) chosen().store(path, std::memory_order_relaxed);
  return path != nullptr;
}

}  // namespace int8kv::cpu
