// What is used here of DLPack's C interface, version 1: how a tensor is described, and the table of functions that a library of tensors
// offers to those who read its tensors (`type.__dlpack_c_exchange_api__`). Layouts as in https://github.com/dmlc/dlpack, which has the meaning.
#pragma once

#include <cstdint>

namespace pymerge::dlpack {

constexpr uint32_t kMajor = 1;
constexpr int32_t kCpu = 1;
constexpr uint8_t kFloat = 2, kBfloat = 4;

struct Device {
  int32_t type;
  int32_t id;
};

struct DataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;  // in elements
  uint64_t byte_offset;
};

struct ExchangeApi {
  uint32_t major, minor;
  ExchangeApi* older;
  void* allocate;
  void* to_managed;
  void* from_managed;
  int (*describe)(void* py_object, Tensor* out);  // borrows from the object; may be null; -1 with a Python exception set
  void* current_stream;
};

}  // namespace pymerge::dlpack
