// Scratch memory of one thread: taken piece by piece, given back all at once, kept for the next time.

#pragma once

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

class Arena {
    struct Piece { char *memory; size_t size; };
    Piece piece[32];  // each at least as large as all before it
    int pieces, current;
    size_t used;

  public:
    Arena() : pieces(0), current(0), used(0) {}
    ~Arena() { for (int i = 0; i < pieces; ++i) free(piece[i].memory); }
    Arena(const Arena &) = delete;
    void operator=(const Arena &) = delete;

    // Uninitialised, at the start of a line of the cache: vectors that lie across two lines cost an eighth of a product's time.
    template <class T> T *take(int64_t count) {
        const size_t bytes = (sizeof(T) * (size_t)count + 64 + 63) / 64 * 64;  // a vector may be read at the last one
        while (current < pieces && used + bytes > piece[current].size) ++current, used = 0;
        if (current == pieces) {
            size_t size = 1 << 16;
            for (int i = 0; i < pieces; ++i) size += piece[i].size;
            if (size < bytes) size = bytes;
            piece[pieces++] = {(char *)aligned_alloc(64, size), size};
        }
        T *found = (T *)(piece[current].memory + used);
        used += bytes;
        return found;
    }
    template <class T> T *zeros(int64_t count) { return (T *)memset(take<T>(count), 0, sizeof(T) * (size_t)count + 64); }

    struct Mark { int current; size_t used; };
    Mark mark() const { return {current, used}; }
    void back(Mark m) { current = m.current, used = m.used; }
};
