// An accelerator that is none: two devices "sim" of torch's PrivateUse1 key, whose memory is main
// memory. Each operation is done by the CPU, on tensors that share the memory of those on "sim".
#include <ATen/EmptyTensor.h>
#include <ATen/ops/empty_strided.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <set>

namespace at::autocast {  // of ATen/autocast_mode.h, which takes half as long again to compile
TORCH_API ScalarType get_autocast_dtype(c10::DeviceType);
TORCH_API Tensor cached_cast(ScalarType, const Tensor&, c10::DeviceType);
}  // namespace at::autocast

namespace {

using c10::Device, c10::DeviceIndex, c10::Stream, at::Tensor;
using torch::jit::Stack;

constexpr auto SIM = c10::DeviceType::PrivateUse1;
constexpr DeviceIndex DEVICES = 2;
constexpr size_t ALIGNMENT = 64;  // as of CPU tensors
thread_local DeviceIndex current = 0;

// What is counted. A real device works while the host goes on: it is busy from any operation on,
// until the host asks for a value.
std::atomic<bool> busy{false};
std::atomic<int64_t> waits{0};  // of the host for a busy device
std::atomic<int64_t> sent{0};   // blocking copies to the device
std::atomic<int64_t> live{0};   // bytes that tensors hold there
std::atomic<int64_t> torn{0};   // copies whose source was changed before they were done

// ------------------------------------------------------------------ pinned memory, and waiting

// A real device copies from pinned memory while the host goes on. Here the copy is made at once,
// and compared with what it was made from when the host waits, or gives the memory back.
struct Block {
  size_t size;
  c10::DataPtr memory;
  std::string sent;  // all of it, as it was when a part of it was sent
};
auto& pinned = *new std::map<const char*, Block>;  // for as long as there may be tensors
std::mutex pinning;                                // by a thread of the loader, too

Block* find(const void* place) {
  auto block = pinned.upper_bound(static_cast<const char*>(place));
  if (block == pinned.begin() || place >= (--block)->first + block->second.size) return nullptr;
  return &block->second;
}

void check(Block& block) {
  torn += !block.sent.empty() && std::memcmp(block.memory.get(), block.sent.data(), block.size);
  block.sent.clear();
}

struct PinnedMemory final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    const std::lock_guard guard(pinning);
    c10::DataPtr memory = c10::GetAllocator(at::kCPU)->allocate(size + 1);
    void* start = memory.get();
    pinned[static_cast<char*>(start)] = {size + 1, std::move(memory)};
    return {start, start, &release, at::kCPU};
  }
  void copy_data(void* to, const void* from, size_t size) const override {
    std::memcpy(to, from, size);
  }
  static void release(void* start) {
    const std::lock_guard guard(pinning);
    check(*find(start));
    pinned.erase(static_cast<char*>(start));
  }
};
PinnedMemory pinned_memory;

void wait() {
  const std::lock_guard guard(pinning);
  for (auto& [start, block] : pinned) check(block);
  waits += busy.exchange(false);
}

// ------------------------------------------------------------------------- device and its memory

DeviceIndex exchange(DeviceIndex index) {
  TORCH_CHECK(index < DEVICES, "no device sim:", int(index));
  const DeviceIndex before = current;
  current = index < 0 ? current : index;
  return before;
}

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return SIM; }
  Device getDevice() const override { return {SIM, current}; }
  Device exchangeDevice(Device device) const override { return {SIM, exchange(device.index())}; }
  void setDevice(Device device) const override { exchange(device.index()); }
  void uncheckedSetDevice(Device device) const noexcept override { current = device.index(); }
  DeviceIndex deviceCount() const noexcept override { return DEVICES; }
  void synchronizeDevice(const DeviceIndex) const override { wait(); }
  // One stream a device, so that there is nothing to wait for between streams.
  Stream getStream(Device device) const noexcept override {
    return Stream(Stream::DEFAULT, device);
  }
  Stream getNewStream(Device device, int) const override { return getStream(device); }
  Stream exchangeStream(Stream stream) const noexcept override { return stream; }
  void record(void**, const Stream&, DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
};
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard);

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const { return true; }      // both without `override`: torch 2.6 may not have
  bool isAvailable() const { return true; }  // them yet
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return DEVICES; }
  DeviceIndex getCurrentDevice() const override { return current; }
  void setCurrentDevice(DeviceIndex index) const override { exchange(index); }
  DeviceIndex exchangeDevice(DeviceIndex index) const override { return exchange(index); }
  DeviceIndex maybeExchangeDevice(DeviceIndex index) const override { return exchange(index); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &pinned_memory; }
  bool isPinnedPtr(const void* place) const override {
    const std::lock_guard guard(pinning);
    return find(place);
  }
};

struct Memory final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    const size_t blocks = size / ALIGNMENT + 2;  // the first holds the size
    void* start = std::aligned_alloc(ALIGNMENT, blocks * ALIGNMENT);
    TORCH_CHECK(start, "out of memory");
    *static_cast<size_t*>(start) = size;
    live += size;
    return {static_cast<char*>(start) + ALIGNMENT, start, &release, Device(SIM, current)};
  }
  void copy_data(void* to, const void* from, size_t size) const override {
    std::memcpy(to, from, size);
  }
  static void release(void* start) {
    live -= *static_cast<size_t*>(start);
    std::free(start);
  }
};
Memory memory;
REGISTER_ALLOCATOR(SIM, &memory);

// ------------------------------------------------------------------------------------ operations

// A CPU tensor that shares the memory of one on "sim"; a CPU tensor as it is.
Tensor share(const Tensor& tensor) {
  if (tensor.is_cpu()) return tensor;
  const c10::Storage& storage = tensor.storage();
  c10::DataPtr data(const_cast<void*>(storage.data()), at::kCPU);
  auto* allocator = c10::GetAllocator(at::kCPU);
  c10::Storage shared({}, storage.nbytes(), std::move(data), allocator, /*resizable=*/true);
  const c10::DispatchKeySet keys(c10::DispatchKey::CPU);
  Tensor result = at::detail::make_tensor<c10::TensorImpl>(std::move(shared), keys, tensor.dtype());
  auto* impl = result.unsafeGetTensorImpl();
  impl->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
  return result;
}

// What an operation's arguments are on both sides.
struct Call {
  const c10::OperatorHandle& op;
  std::vector<std::pair<Tensor, Tensor>> arguments;  // on "sim", and as the CPU sees it

  Tensor lend(const Tensor& tensor) {
    if (!tensor.defined()) return tensor;
    if (tensor.is_cpu()) {  // a single value may come from anywhere, as on a GPU
      TORCH_CHECK(!tensor.dim(), "tensors on two devices, cpu and sim: ", op.schema().name());
      return tensor;
    }
    const Device device = arguments.empty() ? tensor.device() : arguments[0].first.device();
    TORCH_CHECK(tensor.device() == device, "tensors on two devices: ", op.schema().name());
    arguments.emplace_back(tensor, share(tensor));
    return arguments.back().second;
  }

  Tensor take(const Tensor& result) const {
    if (!result.defined()) return result;
    for (const auto& [tensor, shared] : arguments) {
      if (result.is_same(shared)) return tensor;
    }
    for (const auto& [tensor, shared] : arguments) {
      const bool view = result.nbytes() && result.storage().data() == shared.storage().data();
      TORCH_CHECK(!view, "makes a view, which needs a kernel of its own: ", op.schema().name());
    }
    TORCH_CHECK(!arguments.empty(), "makes a tensor from nothing: ", op.schema().name());
    const auto options = result.options().device(arguments[0].first.device());
    Tensor taken = at::empty_strided(result.sizes(), result.strides(), options);
    share(taken).copy_(result);
    return taken;
  }

  // Where the result replaces an argument that had another size.
  void resize() const {
    for (const auto& [tensor, shared] : arguments) {
      if (shared.sizes().equals(tensor.sizes())) continue;
      tensor.resize_(shared.sizes());
      share(tensor).copy_(shared);
    }
  }
};

template <typename Change>
void change_tensors(Stack* stack, size_t count, Change change) {
  for (size_t index = stack->size() - count; index < stack->size(); index++) {
    c10::IValue& value = (*stack)[index];
    if (value.isTensor()) {
      value = change(value.toTensor());
    } else if (value.isTensorList()) {
      c10::List<Tensor> list;
      for (const Tensor& tensor : value.toTensorVector()) list.push_back(change(tensor));
      value = list;
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> list;
      for (const std::optional<Tensor>& tensor : value.toOptionalTensorVector()) {
        list.push_back(tensor ? std::optional(change(*tensor)) : tensor);
      }
      value = list;
    }
  }
}

// Operations whose result a real device hands over to the host, or whose size hangs on values.
const std::set<std::string> ASKING{"aten::_unique2", "aten::bincount",        "aten::equal",
                                   "aten::nonzero",  "aten::masked_select", "aten::unique_dim"};

void compute(const c10::OperatorHandle& op, Stack* stack) {
  Call call{op, {}};
  change_tensors(stack, op.schema().arguments().size(), [&](auto& each) { return call.lend(each); });
  op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  change_tensors(stack, op.schema().returns().size(), [&](auto& each) { return call.take(each); });
  call.resize();
  busy = true;
  if (ASKING.count(op.schema().name())) wait();
}

Tensor transfer(const Tensor& from, const Tensor& to, bool non_blocking) {
  if (to.is_cpu()) {
    if (!non_blocking) wait();
  } else if (from.is_cpu()) {
    const std::lock_guard guard(pinning);
    Block* block = non_blocking ? find(from.const_data_ptr()) : nullptr;
    if (block) {
      check(*block);  // it may be sent again, but as it was
      block->sent.assign(static_cast<char*>(block->memory.get()), block->size);
      busy = true;
    } else {
      sent++;
    }
  } else {
    busy = true;
  }
  share(to).copy_(share(from));
  return to;
}

Tensor copy_and_resize(const Tensor& from, const Tensor& to) {
  to.resize_(from.sizes());
  return transfer(from, to, false);
}

at::Scalar item(const Tensor& tensor) {
  wait();
  return share(tensor).item();
}

using Kind = std::optional<at::ScalarType>;
using Layout = std::optional<at::Layout>;
using Place = std::optional<Device>;
using IsPinned = std::optional<bool>;
using Format = std::optional<at::MemoryFormat>;
constexpr c10::DispatchKeySet KEYS(c10::DispatchKey::PrivateUse1);

Tensor empty(at::IntArrayRef size, Kind kind, Layout, Place place, IsPinned, Format format) {
  const c10::DeviceGuard guard(place.value_or(Device(SIM)));
  return at::detail::empty_generic(size, &memory, KEYS, c10::dtype_or_default(kind), format);
}

Tensor empty_strided(
    at::IntArrayRef size, at::IntArrayRef stride, Kind kind, Layout, Place place, IsPinned) {
  const c10::DeviceGuard guard(place.value_or(Device(SIM)));
  const auto type = c10::dtype_or_default(kind);
  return at::detail::empty_strided_generic(size, stride, &memory, KEYS, type);
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("empty.memory_format", empty);
  m.impl("empty_strided", empty_strided);
  m.impl("as_strided", at::native::as_strided_tensorimpl);
  m.impl("view", at::native::view);
  m.impl("resize_", at::native::resize_);
  m.impl("set_.source_Storage", at::native::set_);
  m.impl("set_.source_Storage_storage_offset", at::native::set_storage_cpu_);
  m.impl("_copy_from", transfer);
  m.impl("_copy_from_and_resize", copy_and_resize);
  m.impl("_local_scalar_dense", item);
  // The CPU's own, or it would look for a convolution that is made for this device.
  m.impl("convolution", torch::CppFunction::makeFromBoxedFunction<&compute>());
  m.impl("convolution_backward", torch::CppFunction::makeFromBoxedFunction<&compute>());
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&compute>());
}

// Mixed precision is left to each device: these two are all that a ResNet has.
void compute_lower(const c10::OperatorHandle& op, Stack* stack) {
  const c10::impl::ExcludeDispatchKeyGuard once(c10::DispatchKey::AutocastPrivateUse1);
  const auto type = at::autocast::get_autocast_dtype(SIM);
  change_tensors(stack, op.schema().arguments().size(), [&](auto& each) {
    return at::autocast::cached_cast(type, each, SIM);
  });
  op.callBoxed(stack);
}

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) { m.fallback(torch::CppFunction::makeFallthrough()); }
TORCH_LIBRARY_IMPL(aten, AutocastPrivateUse1, m) {
  m.impl("conv2d", torch::CppFunction::makeFromBoxedFunction<&compute_lower>());
  m.impl("linear", torch::CppFunction::makeFromBoxedFunction<&compute_lower>());
}

TORCH_LIBRARY(sim, m) {
  at::RegisterPrivateUse1HooksInterface(new Hooks());
  m.def("waits() -> int", []() -> int64_t { return waits; });
  m.def("sent() -> int", []() -> int64_t { return sent; });
  m.def("live() -> int", []() -> int64_t { return live; });
  m.def("torn() -> int", []() -> int64_t { return torn; });
}

}  // namespace
