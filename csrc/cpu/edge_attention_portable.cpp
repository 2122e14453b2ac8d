// Attention along edges on any processor.

#include "edge_attention.h"

namespace cellattn::portable {
namespace {
#define CELLATTN_VECTOR_BYTES 16
#include "edge_attention_impl.h"
}  // namespace
CELLATTN_DEFINE_EDGES(float)
CELLATTN_DEFINE_EDGES(double)
}  // namespace cellattn::portable
