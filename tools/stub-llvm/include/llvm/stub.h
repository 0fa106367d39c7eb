// The few names of LLVM's C++ side that cubecl-llvm's shims use. Nothing here can succeed: parsing says that there is
// no LLVM, and no option is registered.
#pragma once
#include <cstddef>
#include <map>
#include <memory>
#include <string>
#include <llvm-c/Core.h>

namespace llvm {
struct LLVMContext {};
struct Module {
  LLVMContext context;
  LLVMContext &getContext() { return context; }
};
inline Module *unwrap(LLVMModuleRef module) { return reinterpret_cast<Module *>(module); }

struct StringRef {
  StringRef(const char *, size_t) {}
};
struct MemoryBufferRef {};
struct MemoryBuffer {
  MemoryBufferRef getMemBufferRef() const { return {}; }
  static std::unique_ptr<MemoryBuffer> getMemBuffer(StringRef, const char *, bool) {
    return std::make_unique<MemoryBuffer>();
  }
};

struct Error {};
inline std::string toString(Error) { return "this program was linked without LLVM"; }
struct ExpectedModule {
  std::unique_ptr<Module> none;
  explicit operator bool() const { return false; }
  Error takeError() { return {}; }
  std::unique_ptr<Module> &operator*() { return none; }
};
inline ExpectedModule parseBitcodeFile(MemoryBufferRef, LLVMContext &) { return {}; }

struct Linker {
  enum Flags { None, LinkOnlyNeeded };
  static bool linkModules(Module &, std::unique_ptr<Module>, unsigned) { return true; }
};

namespace cl {
struct Option {
  bool addOccurrence(unsigned, const char *, const char *) { return true; }
};
inline std::map<std::string, Option *> &getRegisteredOptions() {
  static std::map<std::string, Option *> none;
  return none;
}
} // namespace cl
} // namespace llvm
