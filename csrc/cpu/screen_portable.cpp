// Scores of sets of genes on any processor.

#include "screen.h"

#include <cmath>
#include <cstring>

namespace cellattn::portable {
#define CELLATTN_VECTOR_BYTES 16
#include "screen_impl.h"
}  // namespace cellattn::portable
