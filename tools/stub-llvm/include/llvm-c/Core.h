#pragma once
typedef int LLVMBool;
typedef struct LLVMOpaqueModule *LLVMModuleRef;
