// The engine's operations and activations as C++ types, made from ops.def and acts.def.
#pragma once
#include <cstdint>

namespace {

typedef const float* input;
typedef float* output;
typedef const int32_t* indices;
typedef int64_t integer;
typedef float number;

// conv_args, matvec_args, …: the arguments of the kernel of that name
#define ARG(type, name) type name;
#define OP(name, jobs, ...) struct name##_args { __VA_ARGS__ };
#include "ops.def"
#undef OP
#undef ARG

#define OP(name, jobs, ...) OP_##name,
enum Kind {
#include "ops.def"
};
#undef OP

#define ACT(name, value) ACT_##name,
enum Activation {
#include "acts.def"
};
#undef ACT

// "conv(input x, output y, …, ) matvec(…) ": compared with Python's list when the library is loaded
#define ARG(type, name) #type " " #name ", "
#define OP(name, jobs, ...) #name "(" __VA_ARGS__ ") "
const char* const operation_list =
#include "ops.def"
;
#undef OP
#undef ARG

#define ACT(name, value) #name " "
const char* const activation_list =
#include "acts.def"
;
#undef ACT

// One step of a program: which operation, and its `name_args`
struct Op {
    int64_t kind;
    const void* args;
};

}
