// Attention with dropout on any processor.

#include "attention_dropout.h"

namespace cellattn::portable {
namespace {
#define CELLATTN_VECTOR_BYTES 16
#include "attention_dropout_impl.h"
}  // namespace
CELLATTN_DEFINE_DROPOUT(float)
CELLATTN_DEFINE_DROPOUT(double)
}  // namespace cellattn::portable
