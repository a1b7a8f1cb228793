#pragma once
// Which copy of a kernel runs. Every cpu.cpp is compiled once per instruction set, in a namespace
// named after it (see cmake/op.cmake).

namespace secateur {

enum class Isa { BASE, AVX2, AVX512, AVX512_BF16 };

// Set once, at import (python/secateur/ops/__init__.py), and by tests.
inline Isa current_isa = Isa::BASE;

}  // namespace secateur

#if defined(__x86_64__)
// Declares `declaration` in the namespace of every instruction set.
#define SECATEUR_PER_ISA(declaration) \
  namespace BASE {                    \
  declaration;                        \
  }                                   \
  namespace AVX2 {                    \
  declaration;                        \
  }                                   \
  namespace AVX512 {                  \
  declaration;                        \
  }                                   \
  namespace AVX512_BF16 {             \
  declaration;                        \
  }
// The copy of `fn` for the current instruction set.
#define SECATEUR_FOR_ISA(fn)                                                 \
  (::secateur::current_isa == ::secateur::Isa::AVX512_BF16 ? AVX512_BF16::fn \
   : ::secateur::current_isa == ::secateur::Isa::AVX512    ? AVX512::fn      \
   : ::secateur::current_isa == ::secateur::Isa::AVX2      ? AVX2::fn        \
                                                           : BASE::fn)
#else
#define SECATEUR_PER_ISA(declaration) \
  namespace BASE {                    \
  declaration;                        \
  }
#define SECATEUR_FOR_ISA(fn) (BASE::fn)
#endif
