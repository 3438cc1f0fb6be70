// pybind11 bindings: addresses, sizes and codes in, numbers out. Every check of the arguments is in Python (pymerge/native.py, ops.py).
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <tuple>

#include "bindings.h"
#include "diagnose.h"
#include "dispatch.h"
#include "kl.h"
#include "low_rank.h"
#include "merge.h"
#include "merge_many.h"
#include "select.h"

namespace py = pybind11;

namespace pymerge {
namespace {

using TensorArg = std::tuple<uintptr_t, int>;  // address (0: all zeros), dtype code

Input ToInput(const TensorArg& t) { return {reinterpret_cast<const void*>(std::get<0>(t)), static_cast<DType>(std::get<1>(t))}; }
Output ToOutput(const TensorArg& t) { return {reinterpret_cast<void*>(std::get<0>(t)), static_cast<DType>(std::get<1>(t))}; }

Deltas ToDeltas(int64_t n, bool f64, const TensorArg& base, const std::vector<TensorArg>& models) {
  if (models.empty() || models.size() > kMaxModels) throw std::invalid_argument("1 to 64 models");
  Deltas in;
  in.n = n;
  in.models = static_cast<int>(models.size());
  in.f64 = f64;
  in.base = ToInput(base);
  std::transform(models.begin(), models.end(), in.model, ToInput);
  return in;
}

template <class T>
void Fill(const py::dict& options, const char* key, size_t count, T* into) {
  const auto values = options[key].cast<std::vector<T>>();
  if (values.size() != count) throw std::invalid_argument(std::string(key) + ": one value per model");
  std::copy(values.begin(), values.end(), into);
}

// `options`: see pymerge.native._options. `complete`: a band's selection is among them, and not to be made.
MergePlan ToPlan(int64_t n, bool f64, const TensorArg& base, const std::vector<TensorArg>& models, const py::dict& options,
                 bool complete = true) {
  MergePlan plan;
  MergeJob& job = plan.job;
  job.in = ToDeltas(n, f64, base, models);
  job.sparsify = static_cast<Sparsify>(options["sparsify"].cast<int>());
  job.vote = static_cast<Vote>(options["vote"].cast<int>());
  job.vote_weighted = options["vote_weighted"].cast<bool>();
  job.zero_vote = static_cast<ZeroVote>(options["zero_vote"].cast<int>());
  job.divisor = static_cast<Divisor>(options["divisor"].cast<int>());
  job.scale = options["scale"].cast<double>();
  job.seed = options["seed"].cast<uint64_t>();
  job.tensor_id = options["tensor_id"].cast<uint32_t>();
  plan.rescale = static_cast<Rescale>(options["rescale"].cast<int>());
  plan.tie_all = options["tie_all"].cast<bool>();
  plan.majority = options["majority"].cast<bool>();
  Fill(options, "weights", models.size(), job.weight);
  Fill(options, "densities", models.size(), plan.density);
  Fill(options, "counts", models.size(), plan.counts);
  Fill(options, "keep_below", models.size(), job.keep_below);
  job.in.first = options["first"].cast<int64_t>();
  if (job.in.first % kSumBlock) throw std::invalid_argument("first: not at the begin of a block");
  const auto factors = options["factors"].cast<std::vector<double>>();
  plan.rescaled = !factors.empty();
  if (plan.rescaled) Fill(options, "factors", models.size(), job.rescale);
  const auto selection = options["selection"].cast<std::vector<std::tuple<int64_t, int64_t>>>();
  plan.selected = !selection.empty();
  const bool band = job.sparsify == Sparsify::kBand;
  if ((plan.selected || (band && complete)) && selection.size() != (band ? 2 : 1) * models.size()) {
    throw std::invalid_argument("selection: one row per model, of a band two");
  }
  for (size_t i = 0; i < selection.size(); ++i) {
    Selection& row = i < models.size() ? job.selection[i] : job.larger[i - models.size()];
    row = {std::get<0>(selection[i]), std::get<1>(selection[i]) - job.in.first};
  }
  return plan;
}

bool PyMerge(int64_t n, bool f64, const TensorArg& base, const std::vector<TensorArg>& models, const TensorArg& out,
             const py::dict& options, int threads) {
  MergePlan plan = ToPlan(n, f64, base, models, options);
  plan.job.out = ToOutput(out);
  py::gil_scoped_release release;
  return MergeTensor(&plan, threads);
}

int64_t PyVoteBalance(int64_t n, bool f64, const TensorArg& base, const std::vector<TensorArg>& models, const py::dict& options,
                      int threads) {
  MergePlan plan = ToPlan(n, f64, base, models, options);
  py::gil_scoped_release release;
  return VoteBalance(&plan, threads);
}

std::vector<std::tuple<int64_t, int64_t>> Rows(const std::vector<Selection>& selections) {
  std::vector<std::tuple<int64_t, int64_t>> rows;
  for (const Selection& s : selections) rows.emplace_back(s.key, s.cut);
  return rows;
}

// tensors: (n, base, models) each.
std::vector<std::tuple<int64_t, int64_t>> PySelect(const std::vector<std::tuple<int64_t, TensorArg, std::vector<TensorArg>>>& tensors,
                                                   bool f64, const std::vector<int64_t>& counts, bool tie_all, int threads) {
  std::vector<Deltas> in;
  for (const auto& [n, base, models] : tensors) {
    in.push_back(ToDeltas(n, f64, base, models));
    if (models.size() != counts.size()) throw std::invalid_argument("one count per model");
  }
  py::gil_scoped_release release;
  return Rows(Select(in, counts, tie_all, threads));
}

bool PyLerp(int64_t n, bool f64, const TensorArg& a, const TensorArg& b, bool near_a, double weight, const TensorArg& out, int threads) {
  LerpJob job;
  job.n = n;
  job.f64 = f64;
  job.a = ToInput(a);
  job.b = ToInput(b);
  job.out = ToOutput(out);
  job.near_a = near_a;
  job.weight = weight;
  return LerpTensor(job, threads);
}

void PyAddLowRank(int64_t n, const TensorArg& x, int64_t first, int64_t columns, int64_t rank, uintptr_t left, uintptr_t right,
                  double scale, int threads) {
  LowRankJob job;
  job.x = ToOutput(x);
  job.first = first;
  job.columns = columns;
  job.rank = rank;
  job.left = reinterpret_cast<const float*>(left);
  job.right = reinterpret_cast<const float*>(right);
  job.scale = static_cast<float>(scale);
  AddLowRank(job, n, threads);
}

// `sums`: of the parts before this one.
std::vector<double> PyDots(int64_t n, bool f64, const TensorArg& a, const TensorArg& b, std::vector<double> sums, int threads) {
  if (sums.size() != 3) throw std::invalid_argument("three sums");
  DotProducts(n, ToInput(a), ToInput(b), f64, threads, sums.data());
  return sums;
}

std::vector<double> PyAbsSums(int64_t n, bool f64, const TensorArg& base, const std::vector<TensorArg>& models, const py::dict& options,
                              std::vector<double> sums, int threads) {
  const MergePlan plan = ToPlan(n, f64, base, models, options);
  if (sums.size() != 2 * models.size()) throw std::invalid_argument("two sums per model");
  py::gil_scoped_release release;
  AddAbsSums(plan.job, threads, sums.data());
  return sums;
}

TensorArg At(const int64_t* row, size_t column) { return {static_cast<uintptr_t>(row[column]), static_cast<int>(row[column + 1])}; }

// A tensor's counts follow each other in `counts`, which may have none.
struct Counts {
  std::vector<int64_t> values;
  size_t per_tensor;
};

Counts ToCounts(const py::buffer& buffer, const MergePlan& plan, const Table& table) {
  const bool band = plan.job.sparsify == Sparsify::kBand, ranked = band || plan.job.sparsify == Sparsify::kMagnitude;
  const size_t per_tensor = ranked && !plan.selected ? (band ? 2 : 1) * table.models() : 0;
  const py::buffer_info info = buffer.request();
  if (info.ndim != 1 || info.itemsize != 8 || info.strides[0] != 8 || static_cast<size_t>(info.size) != per_tensor * table.rows() ||
      (band && plan.selected)) {
    throw std::invalid_argument("counts: one per model, of a band two, where none is selected");
  }
  const auto* values = static_cast<const int64_t*>(info.ptr);
  return {std::vector<int64_t>(values, values + info.size), per_tensor};
}

// Points to `counts`.
ManyTensors ToTensors(const Table& table, const Counts& counts) {
  ManyTensors all;
  all.inputs.reserve(table.rows() * table.models());
  all.tensors.resize(table.rows());
  const auto wide = [](const Input& x) { return x.dtype == DType::kF64; };
  for (size_t i = 0; i < table.rows(); ++i) {
    const int64_t* row = table.row(i);
    ManyTensor& t = all.tensors[i];
    t.n = row[0];
    t.tensor_id = static_cast<uint32_t>(row[1]);
    t.out = ToOutput(At(row, Table::kResult));
    t.base = ToInput(At(row, Table::kBase));
    t.f64 = wide(t.base);
    t.models = all.inputs.data() + all.inputs.size();
    for (size_t m = 0; m < table.models(); ++m) {
      all.inputs.push_back(ToInput(At(row, Table::kModels + 2 * m)));
      t.f64 |= wide(all.inputs.back());
    }
    t.counts = counts.values.data() + i * counts.per_tensor;
  }
  return all;
}

MergePlan ToSharedPlan(size_t models, const py::dict& options) {
  return ToPlan(0, false, {0, 0}, std::vector<TensorArg>(models, TensorArg(0, 0)), options, false);
}

std::vector<int64_t> PyMergeMany(const py::buffer& rows, size_t models, const py::buffer& counts, const py::dict& options, int threads) {
  const Table table(rows, models);
  const MergePlan plan = ToSharedPlan(models, options);
  const Counts each = ToCounts(counts, plan, table);
  const ManyTensors tensors = ToTensors(table, each);
  py::gil_scoped_release release;
  return MergeMany(plan, tensors, threads);
}

int64_t PyVoteBalanceMany(const py::buffer& rows, size_t models, const py::buffer& counts, const py::dict& options, int threads) {
  const Table table(rows, models);
  const MergePlan plan = ToSharedPlan(models, options);
  const Counts each = ToCounts(counts, plan, table);
  const ManyTensors tensors = ToTensors(table, each);
  py::gil_scoped_release release;
  return VoteBalanceMany(plan, tensors, threads);
}

// The tensors' ranks taken together.
std::vector<std::tuple<int64_t, int64_t>> PySelectMany(const py::buffer& rows, const std::vector<int64_t>& counts, bool tie_all,
                                                       int threads) {
  if (counts.empty() || counts.size() > kMaxModels) throw std::invalid_argument("1 to 64 models");
  const ManyTensors all = ToTensors(Table(rows, counts.size()), {{}, 0});
  std::vector<Deltas> in(all.tensors.size());
  for (size_t i = 0; i < in.size(); ++i) {
    const ManyTensor& t = all.tensors[i];
    in[i].n = t.n;
    in[i].models = static_cast<int>(counts.size());
    in[i].f64 = all.tensors[0].f64;
    in[i].base = t.base;
    std::copy(t.models, t.models + counts.size(), in[i].model);
  }
  py::gil_scoped_release release;
  return Rows(Select(in, counts, tie_all, threads));
}

// From each base to its one model.
std::vector<int64_t> PyLerpMany(const py::buffer& rows, bool near_a, double weight, int threads) {
  const Table table(rows, 1);
  std::vector<LerpJob> jobs(table.rows());
  for (size_t i = 0; i < jobs.size(); ++i) {
    const int64_t* row = table.row(i);
    LerpJob& job = jobs[i];
    job.n = row[0];
    job.a = ToInput(At(row, Table::kBase));
    job.b = ToInput(At(row, Table::kModels));
    job.out = ToOutput(At(row, Table::kResult));
    job.f64 = job.a.dtype == DType::kF64 || job.b.dtype == DType::kF64;
    job.near_a = near_a;
    job.weight = weight;
  }
  py::gil_scoped_release release;
  return LerpMany(jobs, threads);
}

std::vector<int64_t> PyFindNonFinite(const py::buffer& rows, size_t models, size_t column, int threads) {
  const Table table(rows, models);
  table.RequireTensor(column);
  std::vector<Values> tensors(table.rows());
  for (size_t i = 0; i < tensors.size(); ++i) tensors[i] = {table.row(i)[0], ToInput(At(table.row(i), column))};
  py::gil_scoped_release release;
  return FindNonFinite(tensors, threads);
}

Deltas ToPart(int64_t n, int64_t first, bool f64, const TensorArg& base, const std::vector<TensorArg>& models) {
  Deltas part = ToDeltas(n, f64, base, models);
  part.first = first;
  return part;
}

void DefineStreamedSelection(py::module_& m) {
  using S = StreamedSelection;
  using Unlocked = py::call_guard<py::gil_scoped_release>;
  py::class_<S>(m, "StreamedSelection")
      .def(py::init(&S::Make))
      .def("searched", &S::Searched)
      .def("sample_ranges",
           [](const S& s) {
             std::vector<std::pair<int64_t, int64_t>> ranges;
             for (const FlatRange& r : s.SampleRanges()) ranges.emplace_back(r.begin, r.end);
             return ranges;
           })
      .def(
          "sample",
          [](S& s, int64_t n, int64_t first, bool f64, const TensorArg& base, const std::vector<TensorArg>& models) {
            s.Sample(ToPart(n, first, f64, base, models));
          },
          Unlocked())
      .def(
          "add",
          [](S& s, int64_t n, int64_t first, bool f64, const TensorArg& base, const std::vector<TensorArg>& models, int threads) {
            s.Add({ToPart(n, first, f64, base, models)}, threads);
          },
          Unlocked())
      .def("guesses", [](S& s, int threads) { return Rows(s.Guesses(threads)); })
      .def("strayed", &S::Strayed)
      .def("end_pass", &S::EndPass, Unlocked())
      .def("lookups",
           [](const S& s) {
             std::vector<std::pair<int64_t, int64_t>> ranges;
             for (const Lookup& l : s.Lookups()) ranges.emplace_back(l.begin, l.end);
             return ranges;
           })
      .def("look",
           [](S& s, size_t lookup, int64_t n, int64_t first, bool f64, const TensorArg& base, const std::vector<TensorArg>& models) {
             s.Look(lookup, ToPart(n, first, f64, base, models));
           })
      .def("rows", [](const S& s) { return Rows(s.Result()); });
}

// `options`: see pymerge.native_kl._options. Addresses of fp32 arrays; weight may be 0.
KlJob ToKlJob(int64_t rows, int64_t vocab, const TensorArg& student, const TensorArg& teacher, const py::dict& options, uintptr_t weight,
              uintptr_t stats) {
  KlJob job;
  job.rows = rows;
  job.vocab = vocab;
  job.student = ToInput(student);
  job.teacher = ToInput(teacher);
  if (job.student.dtype == DType::kF64 || job.teacher.dtype == DType::kF64) throw std::invalid_argument("fp64 logits");
  job.kind = static_cast<KlKind>(options["kind"].cast<int>());
  job.beta = options["beta"].cast<double>();
  job.temperature = options["temperature"].cast<double>();
  job.weight = reinterpret_cast<const float*>(weight);
  job.stats = reinterpret_cast<KlStats*>(stats);
  return job;
}

void PyKlForward(int64_t rows, int64_t vocab, const TensorArg& student, const TensorArg& teacher, const py::dict& options,
                 uintptr_t weight, uintptr_t stats, uintptr_t loss, int threads) {
  KlJob job = ToKlJob(rows, vocab, student, teacher, options, weight, stats);
  job.loss = reinterpret_cast<float*>(loss);
  py::gil_scoped_release release;
  KlForwardRows(job, threads);
}

void PyKlBackward(int64_t rows, int64_t vocab, const TensorArg& student, const TensorArg& teacher, const py::dict& options,
                  uintptr_t weight, uintptr_t stats, uintptr_t grad, bool of_teacher, const TensorArg& out, int threads) {
  KlJob job = ToKlJob(rows, vocab, student, teacher, options, weight, stats);
  job.grad = reinterpret_cast<const float*>(grad);
  job.of_teacher = of_teacher;
  job.out = ToOutput(out);
  py::gil_scoped_release release;
  KlBackwardRows(job, threads);
}

// selection: a (key, cut) per model. sums, counts: addresses of DiagnoseSums fp64 and DiagnoseCounts int64 numbers, which are added to.
void PyDiagnose(int64_t n, bool f64, const TensorArg& base, const std::vector<TensorArg>& models,
                const std::vector<std::tuple<int64_t, int64_t>>& selection, uintptr_t sums, uintptr_t counts, int threads) {
  DiagnoseJob job;
  job.in = ToDeltas(n, f64, base, models);
  if (selection.size() != models.size()) throw std::invalid_argument("selection: one row per model");
  for (size_t m = 0; m < selection.size(); ++m) job.selection[m] = {std::get<0>(selection[m]), std::get<1>(selection[m])};
  py::gil_scoped_release release;
  DiagnoseTensor(job, threads, reinterpret_cast<double*>(sums), reinterpret_cast<int64_t*>(counts));
}

// parts: descriptor, offset in bytes and dtype code of the base, where there is one, and of the models. Returns the index of one that could
// not be read, or -1.
int PyDiagnoseFiles(int64_t n, bool f64, bool has_base, const std::vector<std::tuple<int, int64_t, int>>& parts,
                    const std::vector<std::tuple<int64_t, int64_t>>& selection, uintptr_t sums, uintptr_t counts) {
  DiagnoseJob job;
  if (selection.empty() || selection.size() > kMaxModels || parts.size() != selection.size() + has_base) {
    throw std::invalid_argument("1 to 64 models, a part and a row of the selection for each");
  }
  job.in.n = n;
  job.in.f64 = f64;
  job.in.models = static_cast<int>(selection.size());
  for (size_t m = 0; m < selection.size(); ++m) job.selection[m] = {std::get<0>(selection[m]), std::get<1>(selection[m])};
  std::vector<FilePart> files;
  for (const auto& [file, offset, dtype] : parts) files.push_back({file, offset, static_cast<DType>(dtype)});
  py::gil_scoped_release release;
  return DiagnoseFiles(job, has_base, files.data(), reinterpret_cast<double*>(sums), reinterpret_cast<int64_t*>(counts));
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "The C++ merge core; use pymerge.ops.";
  m.def("merge", &PyMerge);
  m.def("merge_many", &PyMergeMany);
  m.def("vote_balance", &PyVoteBalance);
  m.def("vote_balance_many", &PyVoteBalanceMany);
  m.def("select_many", &PySelectMany);
  m.def("lerp_many", &PyLerpMany);
  m.def("find_non_finite", &PyFindNonFinite);
  m.def("select", &PySelect);
  m.def("abs_sums", &PyAbsSums);
  DefineReading(m);
  DefineStreamedSelection(m);
  m.def("lerp", &PyLerp, py::call_guard<py::gil_scoped_release>());
  m.def("dots", &PyDots, py::call_guard<py::gil_scoped_release>());
  m.def("add_low_rank", &PyAddLowRank, py::call_guard<py::gil_scoped_release>());
  m.def("kl_forward", &PyKlForward);
  m.def("kl_backward", &PyKlBackward);
  m.def("diagnose", &PyDiagnose);
  m.def("diagnose_files", &PyDiagnoseFiles);
  m.def("available_isas", &AvailableTargets);
  m.def("current_isa", [] { return std::string(CurrentKernels().name); });
  m.def("use_isa", &SelectTarget);
}

}  // namespace pymerge
