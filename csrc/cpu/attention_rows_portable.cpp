// Attention on any processor.

#include "attention_rows.h"

#include <type_traits>

namespace cellattn::portable {
namespace {
#define CELLATTN_VECTOR_BYTES 16
#include "attention_rows_impl.h"
}  // namespace
CELLATTN_DEFINE_ATTENTION(float)
CELLATTN_DEFINE_ATTENTION(double)
}  // namespace cellattn::portable
