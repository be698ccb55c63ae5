// The CPU codec's Python bindings: numbers <-> the body of a payload, for one payload and for whole messages.
// Nothing here trusts its arguments: every size is checked against the buffers before a byte is touched.
//
// The headers are for this file alone, and what they define is in unnamed namespaces: the compiler may inline and
// specialise what nobody else can call.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "buffers.hpp"
#include "dispatch.hpp"
#include "entropy/read.hpp"
#include "entropy/write.hpp"
#include "payload.hpp"
#include "segments.hpp"

namespace py = pybind11;

namespace {

// --- arguments ------------------------------------------------------------------------------------------

Buffer buffer(const py::array& array) {
  return {static_cast<std::uint8_t*>(const_cast<void*>(array.data())),
          static_cast<std::uint64_t>(array.size()),
          static_cast<std::size_t>(array.itemsize()),
          array.ndim() == 1,
          (array.flags() & py::array::c_style) != 0,
          array.writeable()};
}

std::vector<Buffer> buffers(const std::vector<py::array>& arrays) {
  std::vector<Buffer> all;
  for (const py::array& array : arrays) all.push_back(buffer(array));
  return all;
}

template <class T>
using Rows = py::array_t<T, py::array::c_style>;

// NumPy has arrays that begin anywhere, and pybind11 takes them as they are.
template <class T>
const T* items(const Rows<T>& array, const char* what) {
  if (reinterpret_cast<std::uintptr_t>(array.data()) % alignof(T) != 0) {
    throw py::value_error(std::string(what) + " not aligned");
  }
  return array.data();
}

template <class T>
Matrix<T> matrix(const Rows<T>& array, const char* what) {
  const T* const data = items(array, what);
  if (array.ndim() != 2) return {data, 0, -1};
  return {data, array.shape(0), array.shape(1)};
}

Spacing spacing_of(const std::string& name) {
  if (name == "uniform") return Spacing::kUniform;
  if (name == "exponential") return Spacing::kExponential;
  throw py::value_error("spacing must be 'uniform' or 'exponential'");
}

Coding coding_of(std::int64_t number) {
  if (number == 1) return Coding::kElias;
  if (number == 2) return Coding::kHuffman;
  throw py::value_error("coding must be 1 (elias) or 2 (huffman)");
}

// --- one payload ----------------------------------------------------------------------------------------

std::uint32_t encode(const py::array& values, const std::string& dtype, int bits, const std::string& norm,
                     const std::string& spacing, std::uint64_t bucket_size, std::uint64_t seed, std::uint32_t shift,
                     bool nearest, std::uint64_t first_word, const py::array& body,
                     const std::optional<py::array>& residual, std::int64_t threads) {
  const std::size_t type = dtype_index(dtype);
  const auto count = static_cast<std::uint64_t>(values.size());
  const Layout layout = checked_layout(count, bucket_size, bits);
  if (norm != "max" && norm != "l2") throw py::value_error("norm must be 'max' or 'l2'");
  Encoding job{contiguous_bytes(buffer(values), kItemSizes[type], false, "values"),
               layout,
               norm == "max" ? Norm::kMax : Norm::kL2,
               spacing_of(spacing),
               seed,
               shift,
               nearest,
               first_word,
               contiguous_bytes(buffer(body), 1, true, "body"),
               residual ? residual_of(buffer(*residual), buffer(values)) : nullptr};
  if (static_cast<std::uint64_t>(body.size()) != layout.body_size()) {
    throw py::value_error("body has the wrong size");
  }
  const Kernels& kernels = *chosen;
  py::gil_scoped_release release;
  return run_encoding(job, kernels, type, threads);
}

std::vector<std::uint32_t> decode_sum(const std::vector<py::array>& bodies, std::uint64_t bucket_size, int bits,
                                      const std::string& spacing, float weight, std::uint64_t first_word,
                                      const py::array& out, const std::string& dtype, std::int64_t threads) {
  const std::size_t type = dtype_index(dtype);
  const auto count = static_cast<std::uint64_t>(out.size());
  const Layout layout = checked_layout(count, bucket_size, bits);
  if (bodies.empty()) throw py::value_error("no payloads to decode");
  Decoding job{{}, layout, spacing_of(spacing), weight, first_word,
               contiguous_bytes(buffer(out), kItemSizes[type], true, "out")};
  for (const py::array& body : bodies) {
    job.bodies.push_back(contiguous_bytes(buffer(body), 1, false, "body"));
    if (static_cast<std::uint64_t>(body.size()) != layout.body_size()) {
      throw py::value_error("body has the wrong size");
    }
  }
  const DecodeRange range = chosen->decode[type][bits - kMinBits];
  std::size_t ill_padded = 0;
  std::vector<std::uint32_t> sums;
  {
    py::gil_scoped_release release;
    sums = run_decoding(job, range, threads, &ill_padded);
  }
  if (ill_padded != job.bodies.size()) throw py::value_error("payload is damaged: its padding is not zero");
  return sums;
}

// --- coded payloads -------------------------------------------------------------------------------------

// The coded body of a packed one, after `head` bytes that are left to the caller; and its checksum.
std::pair<py::array, std::uint32_t> compact(const py::array& body, std::uint64_t count, std::uint64_t bucket_size,
                                            int bits, std::int64_t coding, std::uint64_t first_word,
                                            std::uint64_t head) {
  const Layout layout = checked_layout(count, bucket_size, bits);
  const Coding checked_coding = coding_of(coding);
  const std::uint8_t* const packed = contiguous_bytes(buffer(body), 1, false, "body");
  if (static_cast<std::uint64_t>(body.size()) != layout.body_size()) throw py::value_error("body has the wrong size");
  if (head > 1 << 20) throw py::value_error("head is too large");
  const Kernels& kernels = *chosen;
  std::unique_ptr<std::uint8_t[]> room;
  std::uint64_t size = 0;
  std::uint32_t sum = 0;
  {
    py::gil_scoped_release release;
    room = scratch(max_coded_size(layout));
    size = entropy::compact(packed, layout, checked_coding, room.get());
    sum = kernels.checksum(room.get(), size, first_word);
  }
  py::array_t<std::uint8_t> payload(static_cast<py::ssize_t>(head + size));
  std::memset(payload.mutable_data(), 0, head);
  std::memcpy(payload.mutable_data() + head, room.get(), size);
  return {payload, sum};
}

// The packed body of the coded one that `body` begins with, after `head` bytes that are left to the caller; the
// coded one's checksum and its size.
std::tuple<py::array, std::uint32_t, std::uint64_t> expand(const py::array& body, std::uint64_t count,
                                                           std::uint64_t bucket_size, int bits, std::int64_t coding,
                                                           std::uint64_t first_word, std::uint64_t head) {
  const Layout layout = checked_layout(count, bucket_size, bits);
  const Coding checked_coding = coding_of(coding);
  const std::uint8_t* const coded = contiguous_bytes(buffer(body), 1, false, "body");
  const auto size = static_cast<std::uint64_t>(body.size());
  if (head > 1 << 20) throw py::value_error("head is too large");
  if (!is_plausible(layout, size)) throw py::value_error("payload is damaged: it is too short for its values");
  py::array_t<std::uint8_t> room(static_cast<py::ssize_t>(head + layout.body_size() + kSlack));
  std::uint8_t* const out = room.mutable_data();
  const Kernels& kernels = *chosen;
  const char* wrong = nullptr;
  std::uint32_t sum = 0;
  std::uint64_t taken = 0;
  {
    py::gil_scoped_release release;
    std::memset(out, 0, head);
    wrong = entropy::expand(coded, size, layout, checked_coding, out + head, &taken);
    if (wrong == nullptr) sum = kernels.checksum(coded, taken, first_word);
  }
  if (wrong != nullptr) throw py::value_error(std::string("payload is damaged: ") + wrong);
  const auto end = static_cast<py::ssize_t>(head + layout.body_size());
  return {py::array(room[py::slice(0, end, 1)]), sum, taken};
}

// --- many payloads in one call --------------------------------------------------------------------------

using Seeds = Rows<std::uint64_t>;
using Shifts = Rows<std::uint32_t>;

// Of segment i in a step: base[i], which says whose noise it is, mixed with uses[tensors[i]], which says when.
Seeds step_seeds(const Seeds& base, const Rows<std::int64_t>& tensors, const Seeds& uses) {
  if (base.ndim() != 1 || tensors.ndim() != 1 || uses.ndim() != 1 || base.size() != tensors.size()) {
    throw py::value_error("seeds have the wrong shape");
  }
  const std::uint64_t* const whose = items(base, "seeds are");
  const std::int64_t* const tensor = items(tensors, "tensors are");
  const std::uint64_t* const when = items(uses, "uses are");
  Seeds mixed(base.size());
  std::uint64_t* const out = mixed.mutable_data();
  for (py::ssize_t i = 0; i < base.size(); ++i) {
    if (tensor[i] < 0 || tensor[i] >= uses.size()) throw py::value_error("seeds are of a tensor that is not there");
    out[i] = step_seed(whose[i], when[tensor[i]]);
  }
  return mixed;
}

// Returns where the last payload ends.
std::uint64_t encode_segments(const std::vector<py::array>& arrays, const Rows<std::int64_t>& table,
                              const Rows<std::uint8_t>& headers, const Seeds& seeds, const Shifts& shifts,
                              std::uint64_t first_word, std::uint64_t checksum_word, const py::array& message,
                              const std::vector<py::array>& residuals, std::int64_t threads) {
  std::uint8_t* const out = contiguous_bytes(buffer(message), 1, true, "message");
  const std::vector<Buffer> values = buffers(arrays);
  const CheckedTable checked(matrix(table, "table is"), matrix(headers, "headers are"), values, false,
                             static_cast<std::uint64_t>(message.size()), checksum_word);
  if (seeds.ndim() != 1 || static_cast<std::size_t>(seeds.size()) != checked.segments.size() ||
      shifts.ndim() != 1 || shifts.size() != seeds.size()) {
    throw py::value_error("there must be one seed and one shift a table row");
  }
  const std::vector<float*> residual = residuals_of(checked, buffers(residuals), values);
  const std::uint64_t* const seed = items(seeds, "seeds are");
  const std::uint32_t* const shift = items(shifts, "shifts are");
  const Kernels& kernels = *chosen;
  py::gil_scoped_release release;
  return encode_message(checked, kernels, seed, shift, residual, first_word, out, threads);
}

void decode_segments(const std::vector<py::array>& messages, const Rows<std::int64_t>& table,
                     const Rows<std::uint8_t>& headers, std::uint64_t first_word, std::uint64_t checksum_word,
                     float weight, const std::vector<py::array>& outs, std::int64_t threads) {
  if (messages.empty()) throw py::value_error("no messages to decode");
  const Table rows = matrix(table, "table is");
  const bool varies = has_coded(rows);
  std::vector<Incoming> sources;
  for (const py::array& message : messages) {
    const std::uint8_t* const bytes = contiguous_bytes(buffer(message), 1, false, "message");
    sources.push_back({bytes, static_cast<std::uint64_t>(message.size())});
    if (!varies && sources.back().size != sources[0].size) throw py::value_error("messages differ in size");
  }
  // Where sizes vary, the table says where payloads end at most; what is there is compared with that as it is read.
  const std::uint64_t most = varies ? std::numeric_limits<std::int64_t>::max() : sources[0].size;
  const CheckedTable checked(rows, matrix(headers, "headers are"), buffers(outs), true, most, checksum_word);
  const Kernels& kernels = *chosen;
  py::gil_scoped_release release;
  decode_messages(std::move(sources), checked, kernels, first_word, weight, threads);
}

}  // namespace

PYBIND11_MODULE(_native, module) {
  module.doc() = "CPU codec of hvd_quant; see hvd_quant.codec.native for the checked interface.";
  const char* wanted = std::getenv("HVD_QUANT_ISA");
  choose_isa(wanted == nullptr ? "" : wanted);
  module.def("isa", [] { return std::string(chosen->name); });
  module.def("available_isas", &available_isas);
  module.def("choose_isa", &choose_isa, py::arg("name"));
  module.def("encode", &encode, py::arg("values"), py::arg("dtype"), py::arg("bits"), py::arg("norm"),
             py::arg("spacing"), py::arg("bucket_size"), py::arg("seed"), py::arg("shift"), py::arg("nearest"),
             py::arg("first_word"), py::arg("body"), py::arg("residual"), py::arg("threads"));
  module.def("decode_sum", &decode_sum, py::arg("bodies"), py::arg("bucket_size"), py::arg("bits"),
             py::arg("spacing"), py::arg("weight"), py::arg("first_word"), py::arg("out"), py::arg("dtype"),
             py::arg("threads"));
  module.def("entropy_encode", &compact, py::arg("body"), py::arg("count"), py::arg("bucket_size"), py::arg("bits"),
             py::arg("coding"), py::arg("first_word"), py::arg("head"));
  module.def("entropy_decode", &expand, py::arg("body"), py::arg("count"), py::arg("bucket_size"), py::arg("bits"),
             py::arg("coding"), py::arg("first_word"), py::arg("head"));
  module.def("step_seeds", &step_seeds, py::arg("base"), py::arg("tensors"), py::arg("uses"));
  module.def("encode_segments", &encode_segments, py::arg("arrays"), py::arg("table"), py::arg("headers"),
             py::arg("seeds"), py::arg("shifts"), py::arg("first_word"), py::arg("checksum_word"),
             py::arg("message"), py::arg("residuals"), py::arg("threads"));
  module.def("decode_segments", &decode_segments, py::arg("messages"), py::arg("table"), py::arg("headers"),
             py::arg("first_word"), py::arg("checksum_word"), py::arg("weight"), py::arg("outs"),
             py::arg("threads"));
}
