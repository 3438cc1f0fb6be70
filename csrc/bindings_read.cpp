// Fills a Table from lists of torch tensors by torch's DLPack functions, without a Python call per attribute; and looks at what memory they
// share. Whatever is not plain is only reported: pymerge/tree.py says what is wrong with it, if anything is.
#include <pybind11/stl.h>

#include <algorithm>
#include <optional>
#include <utility>
#include <vector>

#include "bindings.h"
#include "dlpack.h"
#include "merge.h"

namespace py = pybind11;

namespace pymerge {
namespace {

std::optional<DType> DTypeOf(const dlpack::DataType& t) {
  if (t.lanes != 1) return {};
  if (t.code == dlpack::kBfloat && t.bits == 16) return DType::kBF16;
  if (t.code != dlpack::kFloat) return {};
  if (t.bits == 32) return DType::kF32;
  if (t.bits == 16) return DType::kF16;
  if (t.bits == 64) return DType::kF64;
  return {};
}

int64_t SizeOf(const dlpack::Tensor& t) {
  int64_t n = 1;
  for (int32_t d = 0; d < t.ndim; ++d) n *= t.shape[d];
  return n;
}

bool Contiguous(const dlpack::Tensor& t) {
  int64_t step = 1;
  for (int32_t d = t.ndim - 1; d >= 0; --d) {
    if (t.shape[d] != 1 && t.strides[d] != step) return false;
    step *= t.shape[d];
  }
  return true;
}

class Reader {
 public:
  // types: the exact classes to read; is_negated: the method that says whether a tensor's memory holds the opposite values. None where the
  // functions are of another version.
  static std::optional<Reader> Make(const py::capsule& api, std::vector<py::object> types, py::object is_negated) {
    const auto* table = static_cast<const dlpack::ExchangeApi*>(PyCapsule_GetPointer(api.ptr(), "dlpack_exchange_api"));
    if (!table) throw py::error_already_set();
    while (table && table->major != dlpack::kMajor) table = table->older;
    if (!table || !table->describe) return {};
    return Reader(table->describe, std::move(types), std::move(is_negated));
  }

  // Reads lists[j] into columns at[j]; shapes are compared with those in the first list, which gives the sizes. None where a tensor is not
  // plain (of the types, dense, contiguous, in CPU memory, of a dtype that is computed with), or is of another shape; else whether the
  // dtypes are the same within each row.
  std::optional<bool> Read(const py::buffer& buffer, size_t models, const std::vector<size_t>& at,
                           const std::vector<py::list>& lists) const {
    const Table table(buffer, models, true);
    for (size_t column : at) table.RequireTensor(column);
    const auto wrong = [&](const py::list& list) { return list.size() != table.rows(); };
    if (at.size() != lists.size() || std::any_of(lists.begin(), lists.end(), wrong)) {
      throw std::invalid_argument("a list per column, a tensor per row");
    }
    bool same = true;
    for (size_t i = 0; i < table.rows(); ++i) {
      int64_t* row = table.row(i);
      dlpack::Tensor first{};
      for (size_t j = 0; j < lists.size(); ++j) {
        dlpack::Tensor t;
        const py::object tensor = lists[j][i];  // raises if a list has become shorter
        if (!Describe(tensor, &t)) return {};
        const std::optional<DType> dtype = DTypeOf(t.dtype);
        const int64_t n = SizeOf(t);
        if (!dtype || t.device.type != dlpack::kCpu || t.byte_offset || (n && (!t.data || !Contiguous(t)))) return {};
        if (j == 0) {
          first = t;
          row[0] = n;
        } else if (t.ndim != first.ndim || !std::equal(t.shape, t.shape + t.ndim, first.shape)) {
          return {};
        }
        row[at[j]] = reinterpret_cast<int64_t>(t.data);
        row[at[j] + 1] = static_cast<int64_t>(*dtype);
        same &= row[at[j] + 1] == row[at[0] + 1];
      }
    }
    return same;
  }

 private:
  using DescribeFunction = int (*)(void*, dlpack::Tensor*);

  Reader(DescribeFunction describe, std::vector<py::object> types, py::object is_negated)
      : describe_(describe), types_(std::move(types)), is_negated_(std::move(is_negated)) {}

  bool Describe(const py::object& tensor, dlpack::Tensor* t) const {
    PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(tensor.ptr()));
    if (std::none_of(types_.begin(), types_.end(), [&](const py::object& known) { return known.ptr() == type; })) return false;
    const auto negated = py::reinterpret_steal<py::object>(PyObject_CallOneArg(is_negated_.ptr(), tensor.ptr()));
    if (negated.ptr() == Py_False && describe_(tensor.ptr(), t) == 0) return true;
    PyErr_Clear();
    return false;
  }

  DescribeFunction describe_;
  std::vector<py::object> types_;
  py::object is_negated_;
};

using Span = std::pair<int64_t, int64_t>;  // addresses [begin, end)

// In order; tensors without elements have none.
std::vector<Span> SpansOf(const Table& table, size_t column) {
  table.RequireTensor(column);
  std::vector<Span> spans;
  for (size_t i = 0; i < table.rows(); ++i) {
    const int64_t* row = table.row(i);
    if (row[0]) spans.emplace_back(row[column], row[column] + row[0] * BytesOf(static_cast<DType>(row[column + 1])));
  }
  std::sort(spans.begin(), spans.end());
  return spans;
}

// Whether no two tensors of a column begin at the same address.
bool Distinct(const py::buffer& buffer, size_t models, size_t column) {
  const std::vector<Span> spans = SpansOf(Table(buffer, models), column);
  return std::adjacent_find(spans.begin(), spans.end(), [](const Span& a, const Span& b) { return a.first == b.first; }) == spans.end();
}

// Whether the tensors of `column` share no memory with each other and none with those of `others`.
bool Apart(const py::buffer& buffer, size_t models, size_t column, const std::vector<size_t>& others) {
  const Table table(buffer, models);
  const std::vector<Span> spans = SpansOf(table, column);
  for (size_t i = 1; i < spans.size(); ++i) {
    if (spans[i].first < spans[i - 1].second) return false;
  }
  for (size_t other : others) {
    auto at = spans.begin();
    for (const Span& span : SpansOf(table, other)) {
      while (at != spans.end() && at->second <= span.first) ++at;
      if (at != spans.end() && at->first < span.second) return false;
    }
  }
  return true;
}

}  // namespace

void DefineReading(py::module_& m) {
  py::class_<Reader>(m, "Reader").def("read", &Reader::Read);
  m.def("reader", &Reader::Make);
  m.def("distinct", &Distinct);
  m.def("apart", &Apart);
}

}  // namespace pymerge
