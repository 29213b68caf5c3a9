#include "kernels/cuda/emulation/fiber.h"

#include <sys/mman.h>

#include <cstdint>
#include <string>
#include <utility>

#include "kernels/base/error.h"

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/common_interface_defs.h>
#endif

namespace rollpack::kernels::cuda::emulation {
namespace {

constexpr size_t kGuardBytes = 4096;
constexpr size_t kStackBytes = 128 * 1024;  // kernels keep little on it; sanitizers keep more

thread_local Fiber* current = nullptr;

// Stacks are whole pages: without this the frames in use of all fibers would lie at the same
// addresses modulo 4 KiB, in the same few sets of the caches. A prime number of places, 7 lines
// apart.
constexpr size_t kPlaces = 127, kPlaceBytes = 7 * 64;
thread_local size_t next_place = 0;

}  // namespace

// void rollpack_switch_stack(void** saved, void* next): pushes the callee-saved registers, leaves
// the stack pointer in *saved and goes on where `next` was saved.
asm(R"(
.text
.type rollpack_switch_stack, @function
rollpack_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size rollpack_switch_stack, . - rollpack_switch_stack
)");
extern "C" void rollpack_switch_stack(void** saved, void* next);

Fiber::Fiber() {
  void* memory = mmap(nullptr, kGuardBytes + kStackBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED || mprotect(memory, kGuardBytes, PROT_NONE) != 0) {
    throw Error({.code = ErrorCode::kResourceExhausted,
                 .field = "fiber stack",
                 .value = std::to_string(kStackBytes),
                 .message = "the system has no such memory"});
  }
  stack_ = static_cast<std::byte*>(memory);
  top_ = stack_ + kGuardBytes + kStackBytes - next_place++ % kPlaces * kPlaceBytes;
}

Fiber::~Fiber() {
  if (stack_ != nullptr) munmap(stack_, kGuardBytes + kStackBytes);
}

void Fiber::start(void (*body)(void*), void* context) {
  body_ = body;
  context_ = context;
  error_ = nullptr;
  is_done_ = false;
  own_fake_stack_ = nullptr;
  // As if run() had been called from nowhere and had saved six registers: a function starts with
  // its return address at a multiple of 16, less 8.
  auto* slot = reinterpret_cast<uintptr_t*>(top_) - 1;
  *slot-- = 0;
  *slot-- = reinterpret_cast<uintptr_t>(&Fiber::run);
  for (int i = 0; i < 6; ++i) *slot-- = 0;
  stack_pointer_ = slot + 1;
}

void Fiber::resume() {
  current = this;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(&resumer_fake_stack_, stack_ + kGuardBytes, kStackBytes);
#endif
  rollpack_switch_stack(&resumer_, stack_pointer_);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(resumer_fake_stack_, nullptr, nullptr);
#endif
  current = nullptr;
  if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
}

void Fiber::suspend() {
  Fiber& self = *current;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(self.is_done_ ? nullptr : &self.own_fake_stack_,
                                 self.resumer_bottom_, self.resumer_bytes_);
#endif
  rollpack_switch_stack(&self.stack_pointer_, self.resumer_);
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(self.own_fake_stack_, &self.resumer_bottom_,
                                  &self.resumer_bytes_);
#endif
}

void Fiber::run() {
  Fiber& self = *current;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(nullptr, &self.resumer_bottom_, &self.resumer_bytes_);
#endif
  try {
    self.body_(self.context_);
  } catch (...) {
    self.error_ = std::current_exception();
  }
  self.is_done_ = true;
  suspend();
}

}  // namespace rollpack::kernels::cuda::emulation
