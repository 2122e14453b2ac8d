// Blocks of maps with a bit a pair on any processor.

#include "edge_blocks.h"

#include <type_traits>

namespace cellattn::portable {
namespace {
#define CELLATTN_VECTOR_BYTES 16
#include "edge_blocks_impl.h"
}  // namespace
CELLATTN_DEFINE_BLOCKS(float)
CELLATTN_DEFINE_BLOCKS(double)
}  // namespace cellattn::portable
