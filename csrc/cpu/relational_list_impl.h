// Which neighbours send, one by one: for instruction sets that do not compress vectors.

// Places and weights of a row's neighbours that send, in order; how many.
template <class T>
inline int64_t list_senders(
    const int32_t* col, const T* value, int64_t n, const int32_t* place, const KeptRow<T>& kept) {
  int64_t count = 0;
  for (int64_t e = 0; e < n; ++e) {
    const int32_t p = place[col[e]];
    kept.col[count] = p;
    kept.value[count] = value[e];
    count += p >= 0;
  }
  return count;
}

inline int64_t count_one_by_one(const int32_t* col, int64_t n, const int32_t* place) {
  int64_t count = 0;
  for (int64_t e = 0; e < n; ++e) count += place[col[e]] >= 0;
  return count;
}
