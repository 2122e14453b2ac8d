// What the headers of a newer compiler ask of libraries that an older system does not have: part of wheels, and of nothing else.

#include <new>
#include <sstream>

// Read by std::shared_ptr to spare itself atomic counts; there since glibc 2.32. "No" is always right.
extern "C" {
__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;
}

namespace std {

// Since GCC 11.
void __throw_bad_array_new_length() { throw bad_array_new_length(); }

// Since GCC 9.
template basic_ostringstream<char>::basic_ostringstream();
template basic_stringstream<char>::basic_stringstream();

}  // namespace std
