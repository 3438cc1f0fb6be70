// The parts of the Python module.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>

namespace pymerge {

// A row of 64-bit integers per tensor: size, tensor id, then an address and a dtype code for each of result, base (address 0: all zeros) and
// models. Some calls need not all of them.
class Table {
 public:
  static constexpr size_t kResult = 2, kBase = 4, kModels = 6;

  explicit Table(const pybind11::buffer& buffer, size_t models, bool writable = false)
      : info_(buffer.request(writable)), models_(models), width_(kModels + 2 * models) {
    if (info_.ndim != 1 || info_.itemsize != 8 || info_.strides[0] != 8 || info_.size % static_cast<pybind11::ssize_t>(width_)) {
      throw std::invalid_argument("not rows of 64-bit integers");
    }
  }
  size_t models() const { return models_; }
  size_t rows() const { return static_cast<size_t>(info_.size) / width_; }
  int64_t* row(size_t i) const { return static_cast<int64_t*>(info_.ptr) + i * width_; }
  // Throws unless `column` is a result's, a base's or a model's.
  void RequireTensor(size_t column) const {
    if (column < kResult || column >= width_ || column % 2) throw std::invalid_argument("no column of a tensor");
  }

 private:
  pybind11::buffer_info info_;
  size_t models_, width_;
};

void DefineReading(pybind11::module_& m);  // bindings_read.cpp

}  // namespace pymerge
