/* The initialisers that the real header defines inline. Those that return say "failed" with 1. */
#pragma once
#include <llvm-c/Core.h>
#define NOTHING(name) static inline void LLVMInitialize##name(void) {}
#define FAILED(name) static inline LLVMBool LLVMInitialize##name(void) { return 1; }
NOTHING(AllTargetInfos)
NOTHING(AllTargets)
NOTHING(AllTargetMCs)
NOTHING(AllAsmPrinters)
NOTHING(AllAsmParsers)
NOTHING(AllDisassemblers)
FAILED(NativeTarget)
FAILED(NativeAsmParser)
FAILED(NativeAsmPrinter)
FAILED(NativeDisassembler)
