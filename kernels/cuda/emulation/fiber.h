// A stack on which a function runs until it suspends itself, to be resumed later: one thread of an
// emulated block. Fibers belong to the OS thread that made them. x86-64, System V calling
// convention; a switch saves the callee-saved registers and costs some nanoseconds, where
// swapcontext() would ask the kernel for the signal mask.
#pragma once

#include <cstddef>
#include <exception>

namespace rollpack::kernels::cuda::emulation {

class Fiber {
 public:
  Fiber();  // Errors: resource_exhausted where no memory is left for a stack
  ~Fiber();
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // The next resume() calls body(context). What the fiber was doing before is abandoned: no
  // destructor of its frames runs.
  void start(void (*body)(void*), void* context);
  // Runs the fiber until it suspends or its body returns. Called outside of fibers.
  // Errors: what the body threw.
  void resume();
  bool is_done() const { return is_done_; }

  // Gives control back to the caller of resume(). Called inside of a fiber.
  static void suspend();

 private:
  static void run();  // the first frame of every fiber's stack

  std::byte* stack_ = nullptr;  // lowest page: no access
  std::byte* top_ = nullptr;    // where frames begin
  void* stack_pointer_ = nullptr;
  void* resumer_ = nullptr;  // stack pointer of who called resume()
  void (*body_)(void*) = nullptr;
  void* context_ = nullptr;
  std::exception_ptr error_;
  bool is_done_ = true;
  // What the address sanitizer wants to know of a change of stacks.
  void* own_fake_stack_ = nullptr;
  void* resumer_fake_stack_ = nullptr;
  const void* resumer_bottom_ = nullptr;
  size_t resumer_bytes_ = 0;
};

}  // namespace rollpack::kernels::cuda::emulation
