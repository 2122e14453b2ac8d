// Cross-entropy of rows of scores on any processor.

#include "attention_bce.h"

namespace cellattn::portable {
namespace {
#define CELLATTN_VECTOR_BYTES 16
#include "attention_bce_impl.h"
}  // namespace
CELLATTN_DEFINE_BCE(float)
CELLATTN_DEFINE_BCE(double)
}  // namespace cellattn::portable
