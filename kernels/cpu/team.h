// Threads that work through the stages of a token together: tasks are taken one by one, and whoever is done waits for the rest by spinning, which
// takes a tenth of the time of going to sleep.

#pragma once

#include <atomic>
#include <new>
#include <omp.h>
#include <sched.h>

#include "rows.h"

#define ALONE (1 << 16)  // multiplications that one thread does sooner than two agree on sharing them
#define SHARE (1 << 15)  // in a task, at least

// Vectors of rows in a task: several tasks for every thread, so that one that is held up delays no other.
static inline int64_t chunk(int64_t count, int64_t weights_each, int64_t threads) {
    if (threads == 1) return count;
    const int64_t even = (count + 8 * threads - 1) / (8 * threads), least = (SHARE + weights_each - 1) / weights_each;
    const int64_t share = even > least ? even : least;
    return (share + 7) / 8 * 8;
}

class Team {
    struct alignas(64) Counter { std::atomic<int64_t> value; };
    Counter arrived, round, *next;
    int64_t threads;

  public:
    explicit Team(int64_t stages) : threads(1) {
        arrived.value = 0, round.value = 0;
        next = (Counter *)aligned_alloc(64, sizeof(Counter) * (size_t)stages);
        for (int64_t s = 0; s < stages; ++s) new (&next[s].value) std::atomic<int64_t>(0);
    }
    ~Team() { free(next); }

    // Called by every thread of a parallel region, which may have fewer than were asked for.
    void meet() {
#pragma omp master
        threads = omp_get_num_threads();
#pragma omp barrier
    }
    void wait() {
        if (threads == 1) return;
        const int64_t now = round.value.load(std::memory_order_relaxed);
        if (arrived.value.fetch_add(1, std::memory_order_acq_rel) == threads - 1) {
            arrived.value.store(0, std::memory_order_relaxed);
            round.value.store(now + 1, std::memory_order_release);
        } else {
            for (int64_t spins = 0; round.value.load(std::memory_order_acquire) == now; ++spins) {
                if (spins < 20000) _mm_pause();
                else sched_yield();  // more threads than cores
            }
        }
    }
    // Every task of a stage is done by one thread; then all go on.
    template <class Task> void share(int64_t stage, int64_t tasks, Task task) {
        for (int64_t t; (t = next[stage].value.fetch_add(1, std::memory_order_relaxed)) < tasks;) task(t);
        wait();
    }
};
