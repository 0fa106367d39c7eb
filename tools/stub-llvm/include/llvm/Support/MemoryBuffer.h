#include <llvm/stub.h>
