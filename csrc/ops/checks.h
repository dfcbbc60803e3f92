// What every operator may ask of its arguments. Each check names the argument, what was expected
// and what came.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "format/params.h"

namespace int8kv {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

// A macro, so that a text is put together only when it is needed: the checks run on every call.
#define INT8KV_CHECK(condition, ...)     \
  do {                                   \
    if (!(condition)) fail(__VA_ARGS__); \
  } while (false)

inline bool same_shape(const Tensor& a, const Tensor& b) {
  bool same = a.dim() == b.dim();
  for (int64_t i = 0; same && i < a.dim(); ++i) same = a.size(i) == b.size(i);
  return same;
}

inline std::string shape_of(const Tensor& t) {
  std::ostringstream text;
  text << '[';
  for (int64_t i = 0; i < t.dim(); ++i) text << (i ? ", " : "") << t.size(i);
  text << ']';
  return text.str();
}

inline const char* name_of(ScalarType type) { return torch::headeronly::toString(type); }

inline void check_dim(const Tensor& t, const char* name, int64_t dim, const char* shape) {
  INT8KV_CHECK(t.dim() == dim, name, " must be ", shape, ", got ", shape_of(t));
}

inline void check_type(const Tensor& t, const char* name, ScalarType type) {
  INT8KV_CHECK(t.scalar_type() == type, name, " must be ", name_of(type), ", got ",
               name_of(t.scalar_type()));
}

// Rows of a tensor that is written must not share memory.
inline void check_no_overlap(const Tensor& t, const char* name) {
  for (int64_t dim = 0; dim < t.dim(); ++dim) {
    INT8KV_CHECK(t.size(dim) <= 1 || t.stride(dim) != 0, name,
                 " is written and must not be expanded, got stride 0 in dimension ", dim);
  }
}

inline void check_device(const Tensor& t, const char* name, const Tensor& other,
                         const char* other_name) {
  INT8KV_CHECK(t.is_cuda() == other.is_cuda() && t.get_device_index() == other.get_device_index(),
               name, " must be on the device of ", other_name);
}

inline DType float_type(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    default:
      fail(name, " must be Float, Half or BFloat16, got ", name_of(t.scalar_type()));
  }
}

// The enumerator with that name among the pairs of a name and an enumerator.
template <typename Enum, size_t kCount>
Enum named(const std::string& name, const std::pair<const char*, Enum> (&known)[kCount],
           const char* argument, const char* where) {
  std::string names;
  for (const auto& [known_name, value] : known) {
    if (name == known_name) return value;
    names += (names.empty() ? "" : ", ") + std::string(known_name);
  }
  fail(argument, " '", name, "' does not exist", where, "; supported: ", names);
}

}  // namespace int8kv
